"""The demo's report: one page that loads nothing, says what is true, and trusts no words."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from regrow_toolchain.demo import wording
from regrow_toolchain.demo.images import data_uri
from regrow_toolchain.demo.report import render_html

Report = dict[str, Any]
_VOID = {"meta", "img", "br", "hr", "link", "input"}
_KINDS = {
    "slanted": ("Slanted strokes", 0.62, 0.91),
    "thick": ("Thick strokes", 0.713, 0.934),
    "inverted": ("Inverted noisy scans", 0.384, 0.872),
    "labels": ("Other labels", 0.085, 0.946),
}


def _user(name: str) -> Report:
    title, before, after = _KINDS[name]
    own = name == "labels"
    digit = [[(37 * row + 11 * column) % 256 for column in range(8)] for row in range(8)]
    return {
        "id": name,
        "title": title,
        "condition": f"how {name} was made",
        "own_head": own,
        "samples": 60,
        "labels": [chr(65 + n) if own else str(n) for n in range(10)],
        "before": before,
        "before_se": 0.022,
        "after": after,
        "after_se": 0.013,
        "gain": after - before,
        "gain_se": 0.021,
        "adapter_bytes": 3120,
        "head_bytes": 1290 if own else 0,
        "storage": "int4",
        "parity_max_abs": 2.1e-6,
        "agree": 1.0,
        "swap_ms": {"cold": 1.9, "cached": 0.9, "resident": 0.003},
        "examples": [digit] * 6,
        "examples_plain": [digit] * 6,
        "example_labels": ["3", "7", "6", "9", "4", "8"],
    }


def _times(p50: float) -> dict[str, float]:
    return {"n": 500, "mean": 1.1 * p50, "p50": p50, "p90": 1.2 * p50, "p99": 2 * p50}


def _device() -> Report:
    stages = {
        "Python": 9_000_000,
        "numpy + onnxruntime": 41_000_000,
        "bundle open": 44_600_000,
        "first run": 46_100_000,
        "4 adapters resident": 46_900_000,
    }
    return {
        "torch_blocked": True,
        "blocked": ["torch", "onnx", "transformers"],
        "swap_ms": {"cold": _times(1.9), "cached": _times(0.9), "resident": _times(0.003)},
        "latency_ms": {
            "base": _times(0.31),
            "adapter": _times(0.32),
            "merged": _times(0.3),
            "seeded": _times(0.84),
        },
        "memory": [{"stage": name, "rss_anon": value} for name, value in stages.items()],
        "peak_bytes": 71_000_000,
    }


def _about() -> Report:
    return {
        "regrow": "0.1.0",
        "seconds": 93.1,
        "seed": 0,
        "environment": {
            "python": "3.11.7",
            "numpy": "2.3.1",
            "onnxruntime": "1.31.1",
            "torch": "2.13.0",
            "platform": "Linux-6.1",
            "cpu": "some processor",
            "cores": 2,
            "threads": 2,
        },
        "data": {"name": "scikit-learn load_digits", "train": 1077, "adapt_per_user": 60}
        | {"test": 480},
        "commands": ["regrow inspect demo/bundle", "regrow profile demo/bundle -o demo/profile"],
    }


@pytest.fixture
def report() -> Report:
    dense = {"parameters": 204_000, "accuracy": 0.985, "se": 0.0056, "bytes": 830_000}
    small = {"parameters": 106_000, "accuracy": 0.981, "se": 0.006, "bytes": 430_000}
    return _about() | {
        "backbone": {
            "dense": dense,
            "svd_only": {"accuracy": 0.93, "se": 0.011},
            "compressed": small | {"ratio": 2.0, "layers": 24},
        },
        "users": [_user(name) for name in _KINDS],
        "bytes": {
            "dense_model": 830_000,
            "compressed_model": 430_000,
            "lora": 24_000,
            "lora_int4": 5200,
            "adapter": 3120,
            "lora_rank": 4,
            "adapter_method": "nola",
            "adapter_storage": "int4",
        },
        "bundles": {
            name: {"bytes": 520_000, "seconds": 4.2} for name in ("swappable", "merged", "seeded")
        },
        "device": _device(),
        "checks": [
            {"name": "Each user gains at least 10 points", "limit": "10.0", "value": "22.1"}
            | {"ok": True}
        ],
    }


class _Page(HTMLParser):
    """Counts elements, and notes what is opened but not closed."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.all: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.all.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.all.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        self.words += data.replace("\N{NO-BREAK SPACE}", " ")


def _words(html: str) -> str:
    return _Page(html).words


def test_loads_nothing_and_runs_nothing(report: Report) -> None:
    html = render_html(report)
    links = [
        value
        for _, attributes in _Page(html).all
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "action", "data") and value
    ]
    assert links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert "http" not in re.sub(r'xmlns(:\w+)?="http[^"]*"', "", html)
    assert not re.search(r"<script|<link|@import|url\((?!#)", html)


def test_same_report_same_bytes_of_bounded_size(report: Report) -> None:
    html = render_html(report)
    assert html == render_html(copy.deepcopy(report))
    assert len(html.encode("utf-8")) < 150_000


def test_elements_are_closed_and_ids_unique(report: Report) -> None:
    page = _Page(render_html(report))
    assert not page.wrong
    assert not page.open
    ids = [attributes["id"] for _, attributes in page.all if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_references_inside_the_page_resolve(report: Report) -> None:
    page = _Page(render_html(report))
    ids = {f"#{attributes['id']}" for _, attributes in page.all if "id" in attributes}
    used = {a["href"] for _, a in page.all if a.get("href", "").startswith("#")}
    assert used
    assert used <= ids


def test_every_chart_has_words(report: Report) -> None:
    html = render_html(report)
    charts = re.findall(r"<svg[^>]*>.*?</svg>", html, flags=re.S)
    assert len(charts) == 5
    for chart in charts:
        assert re.match(r'<svg class="chart" role="img" viewBox="[^"]+" aria-label="[^"]+">', chart)
        assert re.search(r"<title>[^<]+</title>", chart)
        assert "var(--ink)" in chart
        assert not re.search(r"#[0-9a-f]{6}|font-family|<!--|~\d", chart)


def test_names_every_user_and_the_figures(report: Report) -> None:
    words = _words(render_html(report))
    for user in report["users"]:
        assert user["title"] in words
        assert user["condition"] in words
        assert f"{wording.percent(user['before'])} → {wording.percent(user['after'])}" in words
    for figure in (
        "98.1%",
        "3.1 to 4.4 KB for each",
        "3.1 KB",
        "830 KB",
        "+33.3 points",
        "3 µs",
        "1.9 ms",
        "71 MB",
        "1,077",
    ):
        assert figure in words
    assert all(command in words for command in report["commands"])


def test_says_that_the_users_are_made(report: Report) -> None:
    words = _words(render_html(report))
    assert "None of them is a real person." in words
    assert "this machine and this run" in words


def test_summary_is_three_sentences(report: Report) -> None:
    steps = re.search(r'<ol class="steps">(.*?)</ol>', render_html(report), flags=re.S)
    assert steps is not None
    sentences = re.findall(r"</b>(.*?)</li>", steps[1])
    assert len(sentences) == 3
    assert all(re.search(r"\.$", s) and not re.search(r"\. ", s) for s in sentences)


def test_hostile_words_stay_words(report: Report) -> None:
    evil = '<script>alert("x")</script> -->  $\\frac$ ~0~ 数字'
    report["users"][0]["title"] = report["users"][1]["condition"] = evil
    report["users"][3]["example_labels"] = [evil] * 6
    report["device"]["memory"][2]["stage"] = report["environment"]["cpu"] = evil
    report["checks"][0]["name"] = report["commands"][0] = evil
    report["users"][0]["gain"] = -0.5
    html = render_html(report)
    assert "<script" not in html
    assert not _Page(html).wrong
    assert evil in _words(html)


def test_memory_that_was_not_measured(report: Report) -> None:
    for stage in report["device"]["memory"]:
        stage["rss_anon"] = None
    report["device"]["peak_bytes"] = None
    words = _words(render_html(report))
    assert "Memory by stage was not measured: this system does not tell." in words
    assert words.count("not measured") > 10


def test_failed_check_and_reachable_torch_are_said(report: Report) -> None:
    report["checks"].append({"name": "too slow", "limit": "1", "value": "2", "ok": False})
    report["device"]["torch_blocked"] = False
    html = render_html(report)
    assert "1 of 2 checks passed, 1 failed" in html
    assert "✗ fail" in html
    assert "cannot import PyTorch" not in html
    assert "not kept from importing PyTorch" in html


def _gains(*gains: float) -> list[Report]:
    return [
        {
            "title": f"u{n}",
            "own_head": False,
            "gain": g,
            "gain_se": 0.02,
            "before": 0.5,
            "after": 0.5 + g,
        }
        for n, g in enumerate(gains)
    ]


@pytest.mark.parametrize(
    ("gains", "sentence"),
    [
        ((0.2, 0.1), "Every user gains with their own adapter; +15.0 points on average, "),
        ((0.2, -0.1), "1 of 2 users gain clearly; worse with the adapter: u1; +5.0 points on"),
        ((-0.2, 0.01), "0 of 2 users gain clearly; worse with the adapter: u0; no clear change"),
        ((0.0, 0.0), "0 of 2 users gain clearly; no clear change for 2; ±0.0 points on average."),
    ],
)
def test_accuracy_takeaway_is_true(gains: tuple[float, ...], sentence: str) -> None:
    takeaway = wording.accuracy_takeaway(_gains(*gains)).replace("\N{NO-BREAK SPACE}", " ")
    assert takeaway.startswith(sentence)


@pytest.mark.parametrize(
    ("adapted", "against"), [(1.1, "10% more than"), (0.9, "10% less than"), (1.001, "as long as")]
)
def test_latency_takeaway_is_true(adapted: float, against: str) -> None:
    assert against in wording.latency_takeaway({"base": {"p50": 1.0}, "adapter": {"p50": adapted}})


def test_means_leave_out_users_with_other_labels(report: Report) -> None:
    takeaway = wording.accuracy_takeaway(report["users"])
    assert "where the labels stay the same, +33.3" in takeaway
    assert "from 57.2% to 90.5%" in takeaway


def test_memory_takeaway_when_memory_falls() -> None:
    stages = [{"stage": str(value), "rss_anon": value} for value in (9e6, 41e6, 40e6)]
    assert (
        wording.memory_takeaway(stages)
        .replace("\N{NO-BREAK SPACE}", " ")
        .endswith("the bundle with its adapters gives 1.0 MB back.")
    )


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(0.0003, "0.3 µs"), (0.003, "3 µs"), (0.9999, "1,000 µs"), (1.9, "1.9 ms"), (4200, "4.2 s")],
)
def test_duration(milliseconds: float, text: str) -> None:
    assert wording.duration(milliseconds).replace("\N{NO-BREAK SPACE}", " ") == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (812, "812 bytes"),
        (3120, "3.1 KB"),
        (9990, "10 KB"),
        (71e6, "71 MB"),
        (None, "not measured"),
    ],
)
def test_size(value: float | None, text: str) -> None:
    assert wording.size(value).replace("\N{NO-BREAK SPACE}", " ") == text


def test_smallest_picture_is_golden() -> None:
    uri = data_uri([[0, 255]])
    assert uri.startswith("data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAIAAAABCAAAAADRSSBW")


def test_odd_numbers_draw(report: Report) -> None:
    """Perfect users, equal sizes, times of zero, one user, no images: still a page."""
    report["users"] = report["users"][:1]
    report["users"][0] |= {"before": 1.0, "after": 1.0, "gain": 0.0, "before_se": 0.0}
    report["users"][0] |= {"examples": [], "examples_plain": [], "example_labels": []}
    report["bytes"] |= {"dense_model": 3120, "compressed_model": 3120, "lora": 3120}
    for times in (report["device"]["swap_ms"], report["device"]["latency_ms"]):
        for name in times:
            times[name] = _times(0.0)
    assert "One small model, 1 user, 3.1 KB" in _words(render_html(report))
