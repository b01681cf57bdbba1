"""Pages: what a template is given is escaped, and what it is not given is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from regrow_toolchain.pages import GAP, Panel, Table, Tile, render_page

_EVIL = """<script>alert("x")</script>' onload='x"""
_PAGE = """{% extends "base.html.jinja" %}
{% import "parts.html.jinja" as parts %}
{% block title %}{{ words }}{% endblock %}
{% block header %}{{ parts.chips([("good", words)]) }}{{ parts.tiles(tiles) }}{% endblock %}
{% block main %}
{% call parts.figure(words, panel) %}{{ words }}{% endcall %}
{{ parts.all_figures(words, tables) }}
{{ parts.definitions({words: words}) }}
{{ parts.paragraphs([words]) }}
{% endblock %}
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package with a template that uses every piece of a page."""
    folder = tmp_path / "some_pages"
    (folder / "templates").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "templates" / "page.html.jinja").write_text(_PAGE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return "some_pages"


def _values(words: str) -> dict[str, Any]:
    return {
        "words": words,
        "tiles": [Tile(words, words, words)],
        "panel": Panel(words, words),
        "tables": [Table(words, [words, words], [[words, words]])],
    }


def test_every_piece_escapes_its_words(package: str) -> None:
    page = render_page(package, "page.html.jinja", **_values(_EVIL))
    assert "<script" not in page
    assert "onload='" not in page
    assert page.count("&lt;script&gt;") == page.count("alert(") > 12


def test_only_markup_is_taken_as_it_is(package: str) -> None:
    values = _values("words") | {"panel": Panel("title", Markup("<svg></svg>"))}
    assert "<svg></svg>" in render_page(package, "page.html.jinja", **values)


def test_a_name_that_is_not_given_is_an_error(package: str) -> None:
    values = _values("words")
    del values["tables"]
    with pytest.raises(UndefinedError, match="tables"):
        render_page(package, "page.html.jinja", **values)


def test_the_same_values_are_the_same_bytes(package: str) -> None:
    first, second = (render_page(package, "page.html.jinja", **_values("x")) for _ in range(2))
    assert first == second
    assert first.startswith("<!doctype html>")
    assert "prefers-color-scheme: dark" in first


def test_a_tile_sets_its_unit_apart() -> None:
    tile = Tile("Swap", f"1.9{GAP}ms", "")
    assert (tile.value, tile.unit, tile.in_words) == ("1.9", "ms", False)
    assert Tile("Swap", "not measured", "").in_words
