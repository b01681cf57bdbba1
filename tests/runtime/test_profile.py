"""regrow profile where only the base install is: the whole command, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from regrow_runtime import RegrowError

pytestmark = pytest.mark.slow

MAIN = "from regrow_toolchain.cli import main; main()"
EXTRAS = ("torch", "onnx", "optimum", "transformers", "accelerate", "rich", "PIL", "sklearn",
          "matplotlib")  # fmt: skip
SHORT = ("--runs", "4", "--seconds", "0", "--rounds", "2", "--residents", "1,3", "--threads", "1")
STAGES = ["interpreter", "numpy", "onnxruntime", "regrow", "open", "first run", "10 more runs"]


@pytest.fixture(scope="module")
def regrow(python):
    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        return python(MAIN, *map(str, arguments), block=EXTRAS, timeout=300)

    return call


@pytest.fixture(scope="module")
def files(make_adapter, tmp_path_factory) -> dict[str, Path]:
    """Two adapters that fit, one of another backbone, one that is no adapter."""
    room = tmp_path_factory.mktemp("adapters")
    found = {name: room / f"{name}.safetensors" for name in ("user", "other", "foreign", "broken")}
    make_adapter(classes=2).save(found["user"])
    make_adapter("lora", "fp16").save(found["other"])
    replace(make_adapter(), backbone_id="sha256:" + "cd" * 32).save(found["foreign"])
    found["broken"].write_bytes(b"nothing")
    return found


@pytest.fixture(scope="module")
def profiled(regrow, bundle_folder, files, tmp_path_factory):
    """The folder, and what the command printed; two good adapters and two bad ones."""
    out = tmp_path_factory.mktemp("profile") / "out"
    options = [part for file in files.values() for part in ("--adapter", file)]
    found = regrow(
        "profile", bundle_folder, *options, "-o", out, *SHORT, "--batch", "1,3",
        "--sustained", "1s", "--memory-limit", "2GB",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return out, found


@pytest.fixture(scope="module")
def record(profiled):
    return json.loads((profiled[0] / "profile.json").read_text(encoding="utf-8"))


@pytest.fixture
def stages_case(bundle_folder) -> dict[str, object]:
    return {"bundle": str(bundle_folder), "profile": "speed", "batch": 1, "length": None,
            "threads": 1, "case": "stages", "adapters": []}  # fmt: skip


def _one_line(found, code, *texts):
    assert found.returncode == code, found.stderr
    assert len(found.stderr.splitlines()) == 1, found.stderr
    assert found.stderr.startswith("regrow: ")
    for text in texts:
        assert text in found.stderr
    assert found.stdout == ""


# -- what it measures ------------------------------------------------------------------------------


def test_three_files_and_a_table(profiled):
    out, found = profiled
    assert sorted(p.name for p in out.iterdir()) == ["profile.html", "profile.json", "profile.md"]
    assert found.stderr == ""
    for text in (
        "batch 3, 1 thread, user",
        "p99",
        "RssAnon",
        "Fits in 2.0 GB: yes",
        "not measured",
    ):
        assert text in found.stdout
    assert "\N{REPLACEMENT CHARACTER}" not in found.stdout
    markdown = (out / "profile.md").read_text(encoding="utf-8")
    assert "| batch 1, 1 thread, no adapter |" in markdown


def test_the_grid_with_and_without_adapters(record):
    cases = [(row["batch"], row["threads"], row["adapter"]) for row in record["latency"]]
    assert cases == [(1, 1, None), (1, 1, "user"), (1, 1, "other"), (3, 1, None), (3, 1, "user")]
    for row in record["latency"]:
        ms = row["ms"]
        assert ms["n"] >= 4
        assert 0 < ms["min"] <= ms["p50"] <= ms["p90"] <= ms["p95"] <= ms["p99"] <= ms["max"]
        assert len(row["rounds"]) == 2
        assert row["cpu_ms"] > 0
        found = row["histogram"]
        assert sum(found["counts"]) + found["beyond"] == ms["n"]
        assert row["energy_mj"] is None or row["energy_mj"] >= 0
        assert (row["energy_mj"] is None) == bool(row["energy_reason"])


def test_adapters_that_do_not_fit_are_named(profiled, record):
    reasons = {a["name"]: a["reason"] for a in record["adapters"]}
    assert reasons["user"] is reasons["other"] is None
    assert "of the bundle's backbone" in reasons["foreign"]
    assert reasons["broken"]
    text = profiled[1].stdout
    assert "adapter foreign is left out: " in text
    assert "adapter broken is left out: " in text
    page = (profiled[0] / "profile.html").read_text(encoding="utf-8")
    assert "Adapter foreign is left out" in page


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_every_stage(record):
    stages = record["memory"]["stages"]
    assert [row["stage"] for row in stages] == [*STAGES, "swap", "run with adapter"]
    for row in stages:
        assert row["rss_anon"] > 1e6
        assert row["peak"] >= row["rss_anon"]
        assert row["pss"] > 1e6
    by_name = {row["stage"]: row for row in stages}
    assert by_name["interpreter"]["rss_anon"] < by_name["onnxruntime"]["rss_anon"]
    assert record["memory"]["platform"] == by_name["onnxruntime"]["rss_anon"]
    assert record["memory"]["source"].startswith("/proc")


def test_cold_start_adds_up(record):
    cold = record["cold_start"]
    assert [row["stage"] for row in cold["stages"]] == STAGES[:-1]
    parts = zip(*(row["rounds"] for row in cold["stages"]), strict=True)
    assert [sum(part) for part in parts] == pytest.approx(cold["rounds"])


def test_swaps_by_number_and_kind(record):
    rows = {(row["installed"], row["kind"]): row for row in record["swap"]}
    kinds = ("cold", "cached", "resident", "first_run")
    assert set(rows) == {(count, kind) for count in (1, 3) for kind in kinds}
    assert all(row["held"] == row["installed"] for row in rows.values())
    assert rows[1, "resident"]["ms"]["p50"] < rows[1, "cold"]["ms"]["p50"]
    assert set(rows[3, "cold"]["parts_ms"]) == {"read", "check", "expand"}
    assert rows[3, "cold"]["cpu_ms"] > 0
    residents = record["residents"]
    assert [(row["count"], row["held"]) for row in residents] == [(1, 1), (3, 3)]


def test_operators_by_module(record):
    operators = record["operators"]
    names = {name for name, _, _ in operators["types"]}
    assert {"MatMul", "Tanh"} <= names
    total = sum(spent for _, spent, _ in operators["modules"])
    assert total == pytest.approx(operators["kernels_us"])
    assert operators["arena"]["held"] >= operators["arena"]["in_use_peak"] > 0


def test_sustained_and_fit(record):
    assert record["sustained"]["seconds"] >= 1
    assert all(window["p50"] <= window["p99"] for window in record["sustained"]["windows"])
    assert record["fit"]["fits"] in (True, None)
    if sys.platform == "linux":
        assert record["fit"]["kind"] in ("RLIMIT_DATA", "cgroup v2 memory.max")


def test_where_it_was_measured(record):
    about = record["environment"]
    assert about["cores"] >= 1
    assert about["onnxruntime"]
    assert {"cpu", "governor", "system", "python", "numpy", "regrow"} <= set(about)
    assert record["noise"]["note"]
    assert record["bundle"]["targets"] == 2
    assert len(record["calibration_ms"]) == 2


# -- the page --------------------------------------------------------------------------------------


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_is_one_file_that_loads_nothing(profiled):
    text = (profiled[0] / "profile.html").read_text(encoding="utf-8")
    page = _Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object"}
    assert not any(key in ("src", "onload") for _, found in page.tags for key in found)
    assert "http" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    charts = [found for tag, found in page.tags if tag == "svg"]
    assert len(charts) == 8
    assert all(found["role"] == "img" and found["aria-label"] for found in charts)


def test_words_of_strangers_are_escaped(record):
    from regrow_toolchain.profiling import record_lines
    from regrow_toolchain.profiling.page import profile_page

    evil = json.loads(json.dumps(record).replace('"user"', '"<script>x</script>|y"'))
    page = profile_page(evil)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert any("<script>x</script>|y" in line for line in record_lines(evil))


@pytest.mark.parametrize(("kind", "told"), [("RLIMIT_DATA", True), ("cgroup v2 memory.max", False)])
def test_what_a_limit_counts_is_told_beside_the_answer(record, kind, told):
    from regrow_toolchain.profiling.text import notes

    fit = {**record["fit"], "kind": kind, "answer": "Fits in 66 MB: no."}
    lines = notes({**record, "fit": fit})
    after = lines[lines.index("Fits in 66 MB: no.") + 1 :]
    assert (bool(after) and "counts private memory that is reserved" in after[0]) is told


def test_a_language_model_and_many_cases_are_drawn(record):
    """The cases by names short enough for a phone; adapters' long names are cut at the end."""
    from regrow_toolchain.pages import GAP
    from regrow_toolchain.profiling.page import profile_page

    changed = json.loads(json.dumps(record).replace('"user"', f'"{"a-user" * 9}"'))
    times = {"ms": record["latency"][0]["ms"] | {"p50": 2.0}, "rounds": [2.0]}
    changed["language"] = {
        "cache": True, "prompt": 16, "tokens": 4, "tokens_per_second": 500.0,
        "prefill": times, "first_token": times, "decode": times,
    }  # fmt: skip
    changed["latency"] = [row | {"length": 16} for row in changed["latency"]] * 4
    page = profile_page(changed).replace(GAP, " ")
    assert "The first token comes after 2 ms, then 500 come in a second." in page
    assert "Prefill, 16 tokens" in page
    assert re.search(r">batch 1 × 16, 1 thread, (a-user)+[a-z-]*…<", page)
    assert ">batch 3 × 16, 1 thread, no adapter<" in page
    assert "4 more cases are in the table below." in page


def test_private_memory_that_is_not_told(record):
    from regrow_toolchain.profiling.page import profile_page

    changed = json.loads(json.dumps(record))
    memory = changed["memory"]
    memory["platform"] = None
    for row in memory["stages"]:
        row["rss_anon"] = None
    for row in changed["residents"]:
        row["each"] = None
    page = profile_page(changed)
    assert "Private memory was not told by this system" in page
    assert "On top of" not in page
    assert "Many users" not in page


# -- comparing -------------------------------------------------------------------------------------


def test_compare_with_itself(regrow, profiled, tmp_path):
    folder = profiled[0]
    found = regrow("profile", "--compare", folder, folder, "-o", tmp_path / "c")
    assert found.returncode == 0, found.stderr
    assert "0 of " in found.stdout
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == ["compare.html", "compare.json", "compare.md"]
    result = json.loads((tmp_path / "c" / "compare.json").read_text(encoding="utf-8"))
    assert all(row["ratio"] == 1 for row in result["rows"])
    assert {row["group"] for row in result["rows"]} >= {"size", "latency", "cold start", "swap"}
    assert "No figure differs" in (tmp_path / "c" / "compare.html").read_text(encoding="utf-8")


def test_a_bundle_twice_as_slow_is_told_from_noise(record):
    from regrow_toolchain.profiling import compare

    a = json.loads(json.dumps(record))
    a["noise"]["others"] = 0.0
    for row in a["latency"]:
        row["rounds"] = [1.0, 1.01, 0.99, 1.02, 0.98]
    b = json.loads(json.dumps(a))
    b["latency"][0]["rounds"] = [2.0, 2.01, 1.99, 2.02, 1.98]
    b["bundle"]["bytes"] += 1
    found = {(row["group"], row["name"]): row for row in compare(a, b)["rows"]}
    slow = found["latency", "batch 1, 1 thread, no adapter"]
    assert slow["real"] is True
    assert slow["low"] <= slow["ratio"] == 2.0 <= slow["high"]
    assert found["latency", "batch 1, 1 thread, adapter user"]["real"] is False
    assert found["size", "bundle"]["real"] is True


def test_a_crowded_machine_and_another_clock_raise_the_bar(record):
    from regrow_toolchain.profiling import compare

    a, b = (json.loads(json.dumps(record)) for _ in range(2))
    a["noise"]["others"], a["environment"]["cores"] = 1.0, 4
    b["noise"]["others"] = 0.0
    b["calibration_ms"] = a["calibration_ms"]
    assert compare(a, b)["floor"] == pytest.approx(1 / 8)  # one thread: its waiting is known
    b["settings"]["cells"][0]["threads"] = 2
    assert compare(a, b)["floor"] == pytest.approx(1 / 3)
    b["calibration_ms"] = [1.5 * value for value in a["calibration_ms"]]
    assert compare(a, b)["floor"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "must be what regrow profile wrote"),
        ('{"kind": "regrow-profile", "format": 99}', "format must be 1, got 99"),
        ("[", "must be JSON"),
        ('{"kind": "regrow-profile", "format": 1}', "every part of its format"),
    ],
)
def test_compare_refuses_other_files(regrow, tmp_path, text, words):
    (tmp_path / "profile.json").write_text(text)
    _one_line(regrow("profile", "--compare", tmp_path, tmp_path), 1, words)


def test_compare_refuses_other_uses(regrow, bundle_folder, tmp_path):
    missing = tmp_path / "nowhere"
    _one_line(regrow("profile", "--compare", missing, missing), 2, "profile must be a folder")
    both = regrow("profile", bundle_folder, "--compare", missing, missing)
    _one_line(both, 2, "--compare takes two profiles")


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--runs", "0"), "--runs"),
        (("--rounds", "0"), "--rounds"),
        (("--batch", "0"), "batch must be numbers from 1"),
        (("--batch", "1,,2"), "batch must be numbers from 1"),
        (("--threads", "one"), "threads must be numbers from 1"),
        (("--length", "16"), "length must be left out"),
        (("--sustained", "soon"), "sustained must be a time such as 30s"),
        (("--sustained", "0s"), "sustained must be a time"),
        (("--memory-limit", "12 apples"), "memory limit must be a size such as 128MB"),
        (("--memory-limit", "2"), "must be at least 1 MB, got '2', which is 2 bytes: give a unit"),
        (("--memory-limit", "0MB"), "memory limit must be a size such as 128MB"),
    ],
)
def test_settings_that_make_no_sense(regrow, bundle_folder, tmp_path, options, words):
    found = regrow("profile", bundle_folder, "-o", tmp_path / "out", *SHORT, *options)
    _one_line(found, 2, words)
    assert not (tmp_path / "out").exists()


def test_bundles_that_do_not_load(regrow, bundle_copy, tmp_path):
    out = ("-o", tmp_path / "out", *SHORT)
    _one_line(regrow("profile", tmp_path / "nowhere", *out), 2, "bundle must be a folder")
    _one_line(regrow("profile", bundle_copy), 2, "folder to write with -o")
    _one_line(regrow("profile"), 2, "give a bundle")
    data = (bundle_copy / "backbone.onnx").read_bytes()
    (bundle_copy / "backbone.onnx").write_bytes(bytes(len(data)))
    _one_line(regrow("profile", bundle_copy, *out), 1, "backbone.onnx could not be opened")
    (bundle_copy / "backbone.onnx").write_bytes(data[:-1])
    _one_line(regrow("profile", bundle_copy, *out), 1, "copy it again")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_kept(regrow, bundle_folder, profiled, tmp_path):
    again = regrow("profile", bundle_folder, "-o", profiled[0], *SHORT)
    _one_line(again, 2, "exists (--force replaces it)")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    forced = regrow("profile", bundle_folder, "-o", tmp_path / "mine", "--force", *SHORT)
    _one_line(forced, 2, "or a folder with profile.json")


def test_json_is_the_last_line_and_bad_adapters_go_to_stderr(
    regrow, bundle_folder, files, tmp_path
):
    found = regrow(
        "profile", bundle_folder, "--adapter", files["broken"], "-o", tmp_path / "out", *SHORT,
        "--rounds", "1", "--json",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert found.stderr.startswith("regrow: adapter broken is left out: ")
    result = json.loads(found.stdout.splitlines()[-1])
    assert result["kind"] == "regrow-profile"
    assert result["swap"] == []
    assert result["residents"] is None


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA")
@pytest.mark.parametrize(
    ("limit", "stage", "words"),
    [
        (100_000, "interpreter", "too little for Python itself"),
        (30_000_000, "numpy", "Importing numpy fails, before any bundle is opened"),
    ],
)
def test_limits_that_are_too_small_name_the_stage(stages_case, limit, stage, words):
    """And a limit that would do, which does when it is asked for."""
    from regrow_toolchain.profiling.fit import measure_fit
    from regrow_toolchain.profiling.processes import run_case

    free = run_case(stages_case).stages
    found = measure_fit(stages_case, limit, free)
    assert found["fits"] is False
    assert found["stage"] == stage
    assert words in found["answer"]
    assert f". {found['enough'] // 10**6} MB would do." in found["answer"]
    again = measure_fit(stages_case, found["enough"], free)
    assert (again["fits"], again["stage"], again["enough"]) == (True, None, None)


def test_the_limit_holds_for_a_bundle_that_is_too_large(monkeypatch):
    """The worker says which stage it was at when memory ran out."""
    from regrow_toolchain.profiling import fit
    from regrow_toolchain.profiling.processes import Outcome

    reached = [{"name": name, "ms": 1.0, "memory": {"data": 10**7}} for name in STAGES[:4]]
    free = [{"name": name, "ms": 1.0, "memory": {"data": 3 * 10**9}} for name in STAGES]
    failed = {"stage": "open", "message": "out of memory"}
    monkeypatch.setattr(fit, "run_case", lambda *_, **__: Outcome(reached, None, failed))
    found = fit.measure_fit({}, 10**9, free)
    assert (found["fits"], found["stage"], found["enough"]) == (False, "open", None)
    assert "The stage that fails: open" in found["answer"]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA")
def test_a_bundle_that_does_not_fit_ends_with_1_and_a_report(regrow, bundle_folder, tmp_path):
    out = tmp_path / "out"
    found = regrow(
        "profile", bundle_folder, "-o", out, *SHORT, "--rounds", "1", "--memory-limit", "30MB",
        "--json",
    )  # fmt: skip
    assert found.returncode == 1
    fit = json.loads(found.stdout.splitlines()[-1])["fit"]
    assert json.loads((out / "profile.json").read_text(encoding="utf-8"))["fit"] == fit
    assert (fit["fits"], fit["stage"]) == (False, "numpy")
    assert found.stderr.splitlines() == [
        "regrow: bundle must fit in 30 MB, got a failure at the stage numpy "
        f"({fit['kind']}): --memory-limit {fit['enough'] // 10**6}MB would do"
    ]


def test_what_it_took_may_not_be_told(monkeypatch):
    """Without /proc: a limit that would do is found all the same."""
    from regrow_toolchain.profiling import fit
    from regrow_toolchain.profiling.processes import Outcome

    silent = [{"name": name, "ms": 1.0, "memory": {"data": None}} for name in STAGES]
    monkeypatch.setattr(fit, "try_limit", lambda _, limit: (
        Outcome(silent, {} if limit > 1.2e9 else None, {"message": "x"}), "RLIMIT_DATA", None
    ))  # fmt: skip
    found = fit.measure_fit({}, 2 * 10**9, silent)
    assert "The system does not tell what it took" in found["answer"]
    assert fit.measure_fit({}, 10**9, silent)["enough"] == 13 * 10**8


def test_a_limit_that_cannot_be_tried_is_no_yes(monkeypatch):
    from regrow_toolchain.cli.commands.profile import check_fit
    from regrow_toolchain.profiling import fit, limits

    monkeypatch.setattr(limits, "make_group", lambda *_: None)
    monkeypatch.setattr(limits.sys, "platform", "darwin")
    found = fit.measure_fit({}, 10**9, [])
    assert found["fits"] is None
    with pytest.raises(RegrowError, match="must be held by Linux, got darwin"):
        check_fit(found)


def test_a_part_that_fails_is_named_and_the_rest_is_made(bundle_folder, files, monkeypatch):
    """As when the disk is too full for copies of adapters, or a prompt is too long to go on."""
    from regrow_toolchain.config import ProfileConfig
    from regrow_toolchain.profiling import parse_settings, record_lines
    from regrow_toolchain.profiling import record as module
    from regrow_toolchain.profiling.page import profile_page
    from regrow_toolchain.profiling.processes import Outcome
    from regrow_toolchain.profiling.text import record_markdown

    real, lost = module.run_case, {"swaps", "residents", "operators", "language", "sustained"}

    def broken(case, **more):
        if case["case"] in lost:
            return Outcome(failed={"stage": "runs", "message": "No space\n left"})
        found = real(case, **more)
        if case["case"] == "check":
            found.result["bundle"]["task"] = "text-generation"
        return found

    monkeypatch.setattr(module, "run_case", broken)
    config = ProfileConfig(runs=2, seconds=0, rounds=1, threads="1", sustained="1s")
    settings = parse_settings(config, quick=False)
    user = [("user", str(files["user"]))]
    found = module.measure_bundle(bundle_folder, user, settings, lambda _: None)
    assert {part["part"] for part in found["failed"]} == lost
    assert found["latency"][0]["ms"]["p50"] > 0
    assert (found["swap"], found["language"], found["operators"]) == ([], None, None)
    for text in (record_markdown(found), "\n".join(record_lines(found))):
        assert "not measured, swaps: No space left" in text
    assert "Not measured, operators: No space left" in profile_page(found)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts over /proc")
def test_without_proc_the_rest_is_still_made(python, bundle_folder, tmp_path):
    """A worker that cannot read /proc/self/status tells the peak, and everything else."""
    code = (
        "import pathlib, regrow_toolchain.measurement.memory as m\n"
        f"m._STATUS = pathlib.Path({str(tmp_path / 'no')!r})\n"
        "m.read_memory.__defaults__ = (m._STATUS, m._STATUS)\n"
        "from regrow_toolchain.profiling import worker\nworker.main()\n"
    )
    case = {"bundle": str(bundle_folder), "profile": "speed", "batch": 1, "length": None,
            "threads": 1, "case": "stages", "adapters": [], "started": 0.0}  # fmt: skip
    found = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(case) + "\n", capture_output=True, text=True,
        check=True, env=None, timeout=60,
    )  # fmt: skip
    from regrow_toolchain.profiling.summary import memory_stages

    said = [json.loads(line) for line in found.stdout.splitlines()]
    memory = memory_stages([[part for part in said if part["event"] == "stage"]])
    assert memory["source"].startswith("getrusage: the peak only, at least that of regrow")
    assert memory["platform"] is None
    assert memory["stages"][-1]["peak"] > 1e7
    assert memory["stages"][-1]["rounds"] == []
    assert said[-1]["event"] == "result"


def test_a_file_of_the_folder_it_runs_in_is_not_imported(regrow, bundle_folder, tmp_path):
    """Workers do not take modules from the current directory."""
    from regrow_toolchain.profiling.processes import run_case

    (tmp_path / "numpy.py").write_text("raise SystemExit('wrong numpy')")
    case = {"bundle": str(bundle_folder), "profile": "speed", "batch": 1, "length": None,
            "threads": 1, "case": "stages", "adapters": []}  # fmt: skip
    shutil.copy(tmp_path / "numpy.py", tmp_path / "json.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        outcome = run_case(case)
    assert outcome.failed is None
    assert [stage["name"] for stage in outcome.stages] == STAGES


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupt_leaves_nothing_behind(environment, bundle_folder, files, tmp_path):
    """No output, no copies of adapters, no worker."""
    (room := tmp_path / "room").mkdir()
    out = tmp_path / "out"
    arguments = ["profile", bundle_folder, "--adapter", files["user"], "-o", out, "--threads", "1"]
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, *map(str, arguments)],
        env={**environment, "TMPDIR": str(room)}, stderr=subprocess.PIPE, text=True,
    ) as running:  # fmt: skip
        for _ in range(600):
            if any(room.glob("regrow-profile-*/*")):
                break
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        assert running.wait(30) == 130
        assert running.stderr is not None
        assert running.stderr.read().strip() == "regrow: interrupted"
    assert list(room.iterdir()) == []
    assert not out.exists()
