"""Pieces of a page. Every word that comes in is escaped; only `figure` takes HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from .formatting import GAP

__all__ = [
    "chips",
    "definitions",
    "document",
    "figure",
    "key",
    "paragraphs",
    "scroll_table",
    "tiles",
]


def document(title: str, css: str, body: Sequence[str]) -> str:
    """The whole page: it loads nothing."""
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape(title)}</title>",
        f"<style>{css}</style>",
    ]
    start, end = ["<!doctype html>", '<html lang="en">', "<head>"], ["</body>", "</html>", ""]
    return "\n".join([*start, *head, "</head>", "<body>", *body, *end])


def chips(items: Sequence[tuple[str, str]]) -> str:
    """Short remarks, each with its kind: "good", "bad" or ""."""
    found = [
        f'<li class="{kind}">{escape(words)}</li>' if kind else f"<li>{escape(words)}</li>"
        for kind, words in items
    ]
    return f'<ul class="chips">{"".join(found)}</ul>'


def tiles(items: Sequence[tuple[str, str, str]]) -> str:
    """Headline figures: a name, a figure with its unit, what to hold it against."""
    return f'<ul class="tiles">{"".join(_tile(*item) for item in items)}</ul>'


def _tile(name: str, words: str, note: str) -> str:
    value, _, unit = words.partition(GAP)
    small = f" <small>{escape(unit)}</small>" if unit else ""
    return (
        f'<li><div class="name">{escape(name)}</div>'
        f'<div class="value">{escape(value)}{small}</div>'
        f'<div class="note">{escape(note)}</div></li>'
    )


def key(kind: str) -> str:
    """A mark as a chart draws it."""
    return f'<span class="key {kind}" aria-hidden="true"></span>'


def figure(kicker: str, title: str, chart: str, caption: str) -> str:
    """A panel with a chart; `chart` and `caption` are HTML."""
    return (
        f'<section class="panel"><p class="kicker">{escape(kicker)}</p><h2>{escape(title)}</h2>'
        f"<figure>{chart}<figcaption>{caption}</figcaption></figure></section>"
    )


def scroll_table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself where it is too wide."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _cells(row: Sequence[str]) -> str:
    rest = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
    return f'<th scope="row">{escape(row[0])}</th>{rest}'


def definitions(facts: Mapping[str, str]) -> str:
    """Words and what they mean."""
    items = (f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return f"<dl>{''.join(items)}</dl>"


def paragraphs(lines: Sequence[str]) -> str:
    """Plain text."""
    return f'<div class="prose">{"".join(f"<p>{escape(line)}</p>" for line in lines)}</div>'
