"""Files from strangers: thousands of mutated ones, each read or refused, none that costs much."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from regrow_format.errors import FormatError, MismatchError
from regrow_runtime import Probe, RegrowError, Validated
from regrow_runtime.store import Store

SCRIPT = Path(__file__).parent / "hostile_files.py"
posix = pytest.mark.skipif(os.name == "nt", reason="memory is read as POSIX tells it")


@pytest.fixture(scope="module")
def good_files(tmp_path_factory, bundle_folder, make_adapter) -> Path:
    """The bundle, and adapters of every method with everything that an adapter may have."""
    folder = tmp_path_factory.mktemp("good")
    shutil.copytree(bundle_folder, folder / "bundle")
    probe = Probe(np.array([0.5, -1.25, 3.0], np.float16), 1e-3)
    scored = (Validated("fp32", "accuracy", 0.5, 0.6, 10),)
    extra = {"norm.weight": np.ones(3, np.float32)}
    for method in ("nola", "vera", "fourierft", "lora", "ia3", "ssf", "bitfit", "head"):
        plain, grouped = make_adapter(method, "int8"), make_adapter(method, "int4", group=8)
        full = replace(
            make_adapter(method, "fp16", classes=2),
            probe=probe, validated=scored, user={"name": "Ana"},
        )  # fmt: skip
        for number, adapter in enumerate((plain, grouped, full)):
            adapter.save(folder / f"{method}-{number}.safetensors")
    replace(make_adapter(), extra=extra).save(folder / "extra.safetensors")
    return folder


def _read_mutated(good_files, tmp_path, environment, count, seed) -> dict[str, int]:
    folder = shutil.copytree(good_files, tmp_path / "files")
    found = subprocess.run(
        [sys.executable, SCRIPT, folder, str(count), str(seed)],
        capture_output=True, text=True, env=environment, timeout=400, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-5000:]
    return json.loads(found.stdout)


@posix
def test_mutated_files(good_files, tmp_path, environment):
    counts = _read_mutated(good_files, tmp_path, environment, 1000, 0)
    assert counts["adapter refused"] > 300
    assert counts["manifest refused"] > 200


@posix
@pytest.mark.slow
def test_20_000_mutated_files(good_files, tmp_path, environment):
    counts = _read_mutated(good_files, tmp_path, environment, 20_000, 1)
    assert counts["adapter refused"] > 8000
    assert counts["manifest refused"] > 5000
    assert counts["head refused"] > 500
    for valid in ("adapter fits", "adapter read", "manifest runs"):  # mutations are mild, too
        assert counts[valid] > 50


def test_a_mutated_index(tmp_path, make_adapter):
    """The store opens and answers, or says in one line that its index is broken."""
    with Store(tmp_path / "store") as store:
        for number in range(4):
            store.add(f"user {number}", make_adapter(draw=number).to_bytes(), activate=True)
    path = store.folder / "index.sqlite"
    good, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(200):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])])
        try:
            with Store(store.folder) as broken:
                broken.verify()
                broken.activate(broken.list()[0].user if broken.list() else "user 1")
        except RegrowError as error:
            refused += 1
            assert "\n" not in str(error)  # noqa: PT017
        for name in ("index.sqlite-wal", "index.sqlite-shm", "index.sqlite-journal"):
            (store.folder / name).unlink(missing_ok=True)
    assert refused > 50


def test_messages_quote_no_commands_to_the_terminal():
    text = "tensor \x1b[2J\nregrow: done " + "a" * 10_000
    assert len(str(FormatError(text))) < 2100
    found = str(MismatchError("head:", [text]))
    assert found.split("\n")[0] == "head:"
    assert all(line.isprintable() for line in found.split("\n"))
