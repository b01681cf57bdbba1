"""The profiler's parts: noise, operators, inputs, limits, settings, energy, memory elsewhere."""

from __future__ import annotations

import os
import random
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from regrow_format.manifest import GraphSpec, Manifest, TensorSpec
from regrow_runtime import UsageError
from regrow_toolchain.config import ProfileConfig
from regrow_toolchain.measurement import (
    CoreWait,
    EnergyMeter,
    Reading,
    available_bytes,
    read_clock,
    read_governor,
    read_load,
)
from regrow_toolchain.profiling import parse_settings
from regrow_toolchain.profiling.cases.operators import group, module_of
from regrow_toolchain.profiling.environment import NoiseMeter
from regrow_toolchain.profiling.feeds import has_length, make_feeds, probe_length
from regrow_toolchain.profiling.limits import memory_limit
from regrow_toolchain.profiling.settings import Cell
from regrow_toolchain.profiling.significance import LEVEL, _skipped, judge

# -- noise -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), [(4, 4), (5, 5), (4, 6)])
def test_the_rank_interval_is_that_of_the_exact_test(m: int, n: int) -> None:
    """Against all orders of m and n values, counted one by one."""
    orders = list(combinations(range(m + n), m))
    statistic = [
        sum(j not in order and j < i for i in order for j in range(m + n)) for order in orders
    ]
    skip = _skipped(m, n)
    assert skip is not None
    allowed = (1 - LEVEL) * len(orders)
    assert 2 * sum(u <= skip for u in statistic) <= allowed
    assert 2 * sum(u <= skip + 1 for u in statistic) > allowed


def test_too_few_rounds_cannot_tell() -> None:
    found = judge([1.0, 1.0, 1.0], [9.0, 9.0, 9.0])
    assert found is not None
    assert (found.ratio, found.low, found.real) == (9.0, None, None)
    assert judge([0.0], [1.0]) is None


def test_noise_alone_is_seldom_a_difference() -> None:
    draw, wrong = random.Random(0), 0
    for _ in range(400):
        a, b = ([draw.gauss(1, 0.1) for _ in range(5)] for _ in range(2))
        found = judge(a, b)
        assert found is not None
        wrong += bool(found.real)
    assert wrong <= 20  # at most 3 % are expected, and fewer with the floor


def test_a_small_difference_counts_only_above_the_floor() -> None:
    a, b = [1.0, 1.0, 1.0, 1.0, 1.0], [1.04] * 5
    assert judge(a, b).real is False  # type: ignore[union-attr]
    assert judge(a, b, floor=0.03).real is True  # type: ignore[union-attr]
    assert judge(b, a, floor=0.03).real is True  # type: ignore[union-attr]


# -- operators -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("/vit/encoder/layer.3/output/dense/base/up/MatMul_kernel_time",
         "vit.encoder.layer.*.output.dense"),
        ("/model/layers.11/mlp/down_proj/MatMul_kernel_time", "model.layers.*.mlp.down_proj"),
        ("/h/0/attn/MatMul/MatMulScaleFusion/_kernel_time", "h.*.attn"),
        ("Gelu_kernel_time", "(fused Gelu)"),
        ("fc1.down_kernel_time", "(fused MatMul)"),
    ],
)  # fmt: skip
def test_modules_are_found_in_names(name: str, module: str) -> None:
    kind = "Gelu" if "Gelu" in name else "MatMul"
    assert module_of(name, kind) == module


def _kernel(name: str, duration: int, kind: str = "MatMul") -> dict[str, object]:
    args = {"op_name": kind, "mem_arena_held": "1000", "mem_in_use_peak": "700"}
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": duration, "args": args}


def test_kernels_are_summed_by_medians() -> None:
    run = [_kernel("/a/MatMul", 10), _kernel("/b/0/Add", 3, "Add"), _kernel("/b/1/Add", 5, "Add")]
    slow = [_kernel("/a/MatMul", 900), *run[1:]]
    events = [{"cat": "Session", "name": "model_run", "dur": 1}, *slow, *run, *run, *run]
    found = group(events, 4, warm=1)
    assert found["modules"] == [["a", 10, 1], ["b.*", 8, 2]]
    assert found["types"] == [["MatMul", 10, 1], ["Add", 8, 2]]
    assert found["kernels_us"] == 18
    assert found["arena"] == {"held": 1000, "in_use_peak": 700}
    assert group([], 4)["modules"] == []


# -- inputs ----------------------------------------------------------------------------------------


def _manifest(*inputs: TensorSpec) -> Manifest:
    graph = GraphSpec("model", "backbone.onnx", inputs, ())
    return Manifest("swappable", "text-generation", "sha256:0", 18, 9, (graph,), (), (), {})


IDS = TensorSpec("input_ids", "int64", ("batch_size", "sequence_length"))
MASK = TensorSpec("attention_mask", "int64", ("batch_size", "sequence_length"))
PIXELS = TensorSpec("pixel_values", "float32", ("batch", 3, "height", "width"))


def test_inputs_without_a_probe(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 7, "image_size": 24}')
    found = make_feeds(tmp_path, _manifest(IDS, MASK), 2, 5)
    assert found["input_ids"].shape == (2, 5)
    assert found["input_ids"].dtype == np.int64
    assert 0 <= found["input_ids"].min() <= found["input_ids"].max() < 7
    assert (found["attention_mask"] == 1).all()
    assert make_feeds(tmp_path, _manifest(PIXELS), 4, None)["pixel_values"].shape == (4, 3, 24, 24)


def test_inputs_from_the_probe_are_cut_and_repeated(tmp_path: Path) -> None:
    ids = np.arange(8, dtype=np.int64).reshape(2, 4)
    save_file({"input_ids": ids}, tmp_path / "probe.safetensors")
    manifest = _manifest(IDS)
    assert (make_feeds(tmp_path, manifest, 2, None)["input_ids"] == ids).all()
    assert make_feeds(tmp_path, manifest, 3, 6)["input_ids"].tolist() == [
        [0, 1, 2, 3, 0, 1], [4, 5, 6, 7, 4, 5], [0, 1, 2, 3, 0, 1],
    ]  # fmt: skip
    assert has_length(manifest)
    assert probe_length(tmp_path, manifest) == 4
    assert probe_length(tmp_path, _manifest(PIXELS)) is None


def test_a_broken_probe_is_left_aside(tmp_path: Path) -> None:
    (tmp_path / "probe.safetensors").write_bytes(b"\xff" * 40)
    assert make_feeds(tmp_path, _manifest(IDS), 1, 3)["input_ids"].shape == (1, 3)


def test_inputs_that_the_model_does_not_take(tmp_path: Path) -> None:
    fixed = TensorSpec("pixel_values", "float32", (1, 3, 8, 8))
    with pytest.raises(UsageError, match="batch must be 1 for this model, got 2"):
        make_feeds(tmp_path, _manifest(fixed), 2, None)
    with pytest.raises(UsageError, match="length must be left out"):
        make_feeds(tmp_path, _manifest(PIXELS), 1, 16)
    with pytest.raises(UsageError, match="at most 1 GiB"):
        make_feeds(tmp_path, _manifest(IDS), 4096, 1 << 20)


# -- settings --------------------------------------------------------------------------------------


def test_settings_are_read() -> None:
    config = ProfileConfig(
        batch="1, 4", length="16,197", threads="2", sustained="10m", memory_limit="128MB"
    )
    found = parse_settings(config, quick=False)
    assert found.cells[:3] == (Cell(1, 16, 2), Cell(1, 197, 2), Cell(4, 16, 2))
    assert (found.sustained, found.memory_limit) == (600, 128_000_000)
    assert parse_settings(ProfileConfig(memory_limit="1.5MiB"), quick=False).memory_limit == 3 << 19


def test_quick_changes_only_what_was_not_told() -> None:
    found = parse_settings(ProfileConfig(runs=100), quick=True, told=["runs"])
    assert found.runs == 100
    assert found.rounds >= 4  # with fewer no difference can be told
    assert found.residents == (1, 10, 100)


# -- waiting for a core ----------------------------------------------------------------------------


def test_waiting_is_what_the_system_tells(tmp_path: Path) -> None:
    path = tmp_path / "schedstat"
    path.write_text("50268137 140964164 35\n")
    wait = CoreWait(path)
    assert (wait.known, wait.read().waited) == (True, 140.964164)
    path.write_text("50268137 141964164 36\n")
    assert wait.read().waited == 141.964164
    wait.close()
    assert (wait.known, wait.read().waited) == (False, 0.0)
    for text in ("", "0 0\n", "none of it\n"):
        path.write_text(text)
        assert not CoreWait(path).known
    assert CoreWait(tmp_path / "missing").read().waited == 0.0


def test_a_stopwatch_takes_waiting_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from regrow_toolchain.profiling.cases import common

    told = [(0, 0), (0, 9), (0, 9), (7.5, 11), (8, 11), (5000, 14), (5000, 14), (5000, 30)]
    told += [(5000, 30), (5000, 30), (6000, 30)]
    readings = iter(Reading(*pair) for pair in told)
    monkeypatch.setattr(common.CoreWait, "read", lambda self: next(readings))
    watch = common.Stopwatch()
    for _ in range(4):
        watch.time(lambda: 10.0, float)
    assert watch.found() == {"ms": [10.0] * 4, "own_ms": 6.5}
    # Nor less than the time on a core, nor more than the wall clock's.
    assert watch.own == [10.0, 2.5, 3.0, 10.0]
    laps = common.Stopwatch()
    laps.laps(lambda told: [told(None), told(None)])
    assert len(laps.ms) == 2
    assert laps.own == [laps.ms[0], 0.0]
    first = common.Stopwatch()
    first.add(laps, slice(0, 1))
    assert first.ms == laps.ms[:1]


# -- limits ----------------------------------------------------------------------------------------


def test_a_group_is_made_and_removed_where_it_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regrow_toolchain.profiling import limits

    (tmp_path / "cgroup.subtree_control").write_text("cpu memory\n")
    removed: list[Path] = []
    monkeypatch.setattr(Path, "rmdir", lambda self: removed.append(self))
    monkeypatch.setattr(limits, "own_groups", lambda root: [root / "none", root])
    with memory_limit(10**9, tmp_path) as held:
        (group,) = tmp_path.glob("regrow-*")
        assert held.kind == "cgroup v2 memory.max"
        assert (group / "memory.max").read_text() == "1000000000"
        assert (group / "memory.swap.max").read_text() == "0"
        assert int((group / "cgroup.procs").read_text()) > 0
    assert removed == [group]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA")
def test_without_groups_it_is_the_limit_of_data(tmp_path: Path) -> None:
    import resource
    import subprocess

    with memory_limit(10**9, tmp_path) as held:
        assert held.kind == "RLIMIT_DATA"
        code = "import resource as r; print(r.getrlimit(r.RLIMIT_DATA), r.getrlimit(r.RLIMIT_AS))"
        told = subprocess.run(
            [sys.executable, "-c", code], preexec_fn=held.enter, capture_output=True, text=True,
            check=True,
        ).stdout  # fmt: skip
    space = resource.getrlimit(resource.RLIMIT_AS)
    assert told.strip() == f"(1000000000, 1000000000) {space}"


# -- the machine -----------------------------------------------------------------------------------


def _rapl(root: Path, name: str, energy: int) -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "max_energy_range_uj").write_text("999999\n")
    (folder / "energy_uj").write_text(f"{energy}\n")
    return folder / "energy_uj"


def test_energy_of_the_packages(tmp_path: Path) -> None:
    first, second = _rapl(tmp_path, "intel-rapl:0", 100), _rapl(tmp_path, "intel-rapl:1", 999_900)
    _rapl(tmp_path, "intel-rapl:0:0", 5)  # a part of the first package: not counted again
    meter = EnergyMeter(tmp_path)
    assert meter.reason is None
    before = meter.read()
    first.write_text("600")
    second.write_text("400")  # it has started anew
    assert meter.joules(before, meter.read()) == pytest.approx((500 + 500) / 1e6)


def test_energy_that_is_not_told(tmp_path: Path) -> None:
    meter = EnergyMeter(tmp_path)
    assert meter.read() is None
    assert meter.joules(None, None) is None
    assert meter.reason == "this machine has no RAPL counters that can be read"


def test_governor_and_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "governor").write_text("powersave\n")
    assert read_governor(tmp_path / "governor") == "powersave"
    assert read_governor(tmp_path / "missing") is None
    stat = "cpu  100 0 100 5000 0 0 0 50 0 0\ncpu0 100 0 100 5000 0 0 0 50 0 0\nintr 5 0\n"
    (tmp_path / "stat").write_text(stat)
    if sys.platform == "linux":
        monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
        load = read_load()
        assert load.busy == pytest.approx(4 * load.stolen)  # type: ignore[operator]
        monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "missing"))
        assert read_load().busy is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_only_cores_that_may_be_used_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned to one core, a program is not disturbed by what others do on the rest."""
    stat = tmp_path / "stat"
    stat.write_text(
        "cpu  900 0 0 5000 0 0 0 0 0 0\ncpu0 700 0 0 0 0 0 0 0 0 0\n"
        "cpu1 50 10 20 4000 9 10 10 5 0 0\ncpu2 150 0 0 0 0 0 0 0 0 0\n"
    )
    tick = os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    for cores, busy, stolen in (({1}, 100, 5), ({0, 1}, 800, 5), ({7}, 900, 0)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, found=cores: found)
        load = read_load()
        assert (load.busy, load.stolen) == pytest.approx((busy / tick, stolen / tick))


def test_noise_of_others_is_noted() -> None:
    from regrow_toolchain.profiling import environment

    assert NoiseMeter().read()["note"]
    assert "not quiet: other programs kept 1.5 cores busy" in environment.note_of(1.5, 0.0, 2.0)
    assert environment.note_of(0.02, 0.0, 2.0).startswith("the machine was quiet")
    assert "not told" in environment.note_of(None, None, None)


def test_memory_on_other_systems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from regrow_toolchain.measurement import memory

    missing = tmp_path / "missing"
    monkeypatch.setattr(memory.sys, "platform", "freebsd14")
    found = memory.read_memory(missing)
    assert found.rss_anon is None
    assert found.peak is None or found.peak > 1e6
    assert "cannot be read" in found.source
    for system in ("darwin", "win32"):
        monkeypatch.setattr(memory.sys, "platform", system)
        found = memory.read_memory(missing)
        info = psutil.Process().memory_full_info()
        assert found.source.startswith("psutil: USS")
        assert found.rss_anon == pytest.approx(info.uss, rel=0.05)
        assert found.rss_anon + found.rss_file == pytest.approx(info.rss, rel=0.05)
        assert found.peak  # in the unit that getrusage has on macOS


def test_memory_that_psutil_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from regrow_toolchain.measurement import memory

    def denied(self: psutil.Process) -> None:
        raise psutil.AccessDenied(self.pid)

    monkeypatch.setattr(psutil.Process, "memory_full_info", denied)
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    found = memory.read_memory(tmp_path / "missing")
    assert found.source.startswith("getrusage: the peak only; psutil tells no private memory")
    assert (found.rss_anon, found.pss) == (None, None)


def test_free_memory_and_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < available_bytes() <= psutil.virtual_memory().total
    clock = read_clock()
    assert clock is None or clock > 0
    monkeypatch.delattr(psutil, "cpu_freq", raising=False)  # psutil has none on some systems
    assert read_clock() is None
