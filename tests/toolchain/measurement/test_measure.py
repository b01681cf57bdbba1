"""Measuring: percentiles by nearest rank, memory and processor as the system tells them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow_toolchain.measurement import Times, measure_in_turns, read_cpu, read_memory


def test_percentiles_of_a_hundred() -> None:
    times = Times.of([float(n) for n in range(100, 0, -1)])
    assert (times.n, times.mean) == (100, 50.5)
    assert (times.p50, times.p90, times.p95, times.p99) == (50.0, 90.0, 95.0, 99.0)
    assert times.spread == (90 - 10) / 50
    assert (times.min, times.max) == (1.0, 100.0)


def test_percentiles_of_few() -> None:
    assert Times.of([3.0]) == Times(1, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 0.0)
    few = Times.of([4.0, 1.0, 2.0])
    assert (few.p50, few.p90, few.p99) == (2.0, 4.0, 4.0)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_percentiles_are_values_that_were_measured(values: list[float]) -> None:
    times = Times.of(values)
    assert {times.p50, times.p90, times.p99} <= set(values)
    assert times.min <= times.p50 <= times.p90 <= times.p99 <= times.max
    for share, value in ((0.5, times.p50), (0.9, times.p90), (0.99, times.p99)):
        assert sum(v <= value for v in values) >= share * len(values) - 1e-9


def test_calls_take_turns_and_warm_up() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = measure_in_turns(calls, repeat=5, warmup=2)
    assert order == ["a", "b"] * 7
    assert {name: found.n for name, found in times.items()} == {"a": 5, "b": 5}
    assert all(found.min >= 0 for found in times.values())


_ROLLUP = "00400000-7ffd rollup\nRss:\t 9 kB\nPss:\t 5 kB\n"
_STATUS = "Name:\tpython\nVmHWM:\t    2000 kB\nRssAnon:\t 1234 kB\nRssFile:\t 7 kB\nThreads:\t1\n"


def test_memory_is_in_bytes(tmp_path: Path) -> None:
    (tmp_path / "status").write_text(_STATUS)
    (tmp_path / "rollup").write_text(_ROLLUP)
    memory = read_memory(tmp_path / "status", tmp_path / "rollup")
    assert (memory.rss_anon, memory.rss_file, memory.peak) == (1263616, 7168, 2048000)
    assert memory.pss == 5120
    assert memory.source.startswith("/proc")


def test_memory_that_the_system_hides(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("VmHWM:\t2000\nRssAnon:\n")
    memory = read_memory(tmp_path / "status", tmp_path / "missing")
    assert (memory.rss_anon, memory.rss_file, memory.peak) == (None, None, None)
    assert (memory.pss, memory.data) == (None, None)
    without = read_memory(tmp_path / "missing", tmp_path / "missing")
    assert (without.rss_anon, without.rss_file) == (None, None)
    assert not without.source.startswith("/proc: ")


def test_a_process_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "status").write_bytes(_STATUS.replace("python", "pythön").encode("latin-1"))
    assert read_memory(tmp_path / "status").rss_anon == 1263616


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_memory_of_this_process() -> None:
    before = read_memory().rss_anon
    eval_data = bytearray(b"x" * (32 << 20))
    after = read_memory()
    assert after.rss_anon is not None
    assert before is not None
    assert after.rss_anon - before > 24 << 20
    assert after.peak is not None
    assert after.peak >= len(eval_data)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_psutil_agrees_where_it_tells_the_same() -> None:
    """On one process: statm's shared pages are RssFile, the rest of the resident ones RssAnon."""
    psutil.Process().memory_full_info()  # what it allocates the first time
    found, info = read_memory(), psutil.Process().memory_full_info()
    assert found.rss_anon == pytest.approx(info.rss - info.shared, abs=256 << 10)
    assert found.rss_file == pytest.approx(info.shared, abs=256 << 10)
    assert found.pss == pytest.approx(info.pss, abs=512 << 10)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="elsewhere psutil is the source")
def test_what_is_measured_does_not_carry_psutil() -> None:
    code = (
        "import sys; from regrow_toolchain.measurement import CoreWait, Times, read_memory\n"
        "import regrow_toolchain.profiling.worker, regrow_toolchain.profiling.cases.residents\n"
        "import regrow_toolchain.profiling.cases.stages, regrow_toolchain.profiling.cases.swaps\n"
        "read_memory(); print('psutil' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "False\n"


def test_the_processor(tmp_path: Path) -> None:
    core = (
        "processor: {}\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx512_vnni avx2 sse4_1x\n"
    )
    (tmp_path / "cpuinfo").write_text(core.format(0) + "\n" + core.format(1))
    cpu = read_cpu(tmp_path / "cpuinfo")
    assert cpu.name == "Some CPU @ 2 GHz"
    assert cpu.cores >= 1
    assert cpu.flags == ("avx2", "avx512_vnni")
    (tmp_path / "arm").write_text("processor: 0\nFeatures\t: fp asimd i8mm\n")
    assert read_cpu(tmp_path / "arm").flags == ("asimd", "i8mm")
    missing = read_cpu(tmp_path / "missing")
    assert missing.name
    assert missing.flags == ()
