"""Ctrl-C in the middle of the work: exit code 130, and the folder is as it was.

A polite kill (SIGTERM) is the same, with 143.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX"),
]

# Says "running" at the third call of a function, then goes on: the signal comes amid real work.
_PROGRAM = """
import importlib, itertools, sys
owner = importlib.import_module({owner!r})
plain, calls = getattr(owner, {name!r}), itertools.count(1)
def told(*args, **options):
    if next(calls) == {at}:
        print("running", flush=True)
    return plain(*args, **options)
setattr(owner, {name!r}, told)
{more}
from regrow_toolchain.cli import main
main()
"""
# The demo in seconds instead of a minute; the device's process then measures for a while.
_TINY_DEMO = """
from dataclasses import replace
from regrow_toolchain.demo import pipeline
plain_settings = pipeline.DemoSettings.with_seed
def tiny(seed):
    found = plain_settings(seed)
    return replace(found, dense=replace(found.dense, epochs=1),
                   compress=replace(found.compress, epochs=1), adapt=replace(found.adapt, steps=2))
pipeline.DemoSettings.with_seed = staticmethod(tiny)
"""

Program = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def room(
    vit_folder: Path,
    images: Callable[..., tuple[np.ndarray, np.ndarray]],
    tmp_path: Path,
) -> Path:
    pixels, labels = images(60, 1)
    np.savez(tmp_path / "d.npz", images=pixels, labels=labels)
    (tmp_path / "vit").symlink_to(vit_folder)
    return tmp_path


_ADAPT = ("adapt", "vit", "--data", "d.npz", "--steps", "1000000", "-o", "new.safetensors")
_COMPRESS = ("compress", "vit", "--data", "d.npz", "--epochs", "1000000", "-o", "new")


@pytest.mark.parametrize(
    ("arguments", "place", "at", "more", "number"),
    [
        (_ADAPT, "adapters.trainer.cosine_factor", 3, "", signal.SIGINT),
        (_COMPRESS, "compress.trainer.check_loss", 3, "", signal.SIGINT),
        (("demo",), "demo.dense_model.check_loss", 3, "", signal.SIGTERM),
        (("demo", "-o", "new"), "demo.pipeline.run_device", 1, _TINY_DEMO, signal.SIGINT),
    ],
    ids=["adapt", "compress", "demo, training, a polite kill", "demo, device"],
)
def test_amid_the_work(
    room: Path,
    start: Program,
    listing: Callable[[Path], dict[str, int]],
    arguments: tuple[str, ...],
    place: str,
    at: int,
    more: str,
    number: signal.Signals,
) -> None:
    before = listing(room)
    owner, _, name = f"regrow_toolchain.{place}".rpartition(".")
    program = _PROGRAM.format(owner=owner, name=name, at=at, more=more)
    process = start(*arguments, cwd=room, program=program)
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    time.sleep(0.3)
    _end(process, number, 130 if number == signal.SIGINT else 143)
    assert listing(room) == before


@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [(_ADAPT, 0.5), (_ADAPT, 1.5), (("demo",), 1.5)],
    ids=["adapt, at once", "adapt, soon", "demo, soon"],
)
def test_at_some_moment(
    room: Path,
    start: Program,
    listing: Callable[[Path], dict[str, int]],
    arguments: tuple[str, ...],
    seconds: float,
) -> None:
    """While packages are imported, or later, as fast as the machine is."""
    before = listing(room)
    process = start(*arguments, cwd=room)
    time.sleep(seconds)
    _end(process, signal.SIGINT, 130)
    assert listing(room) == before


def _end(process: subprocess.Popen[str], number: signal.Signals, code: int) -> None:
    sent = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert out == ""
    assert time.monotonic() - sent < 10
