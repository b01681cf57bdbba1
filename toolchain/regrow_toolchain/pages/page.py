"""A page out of a template: one file that loads nothing, the same bytes for the same values."""

from __future__ import annotations

from importlib import resources
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

__all__ = ["render_page"]


def render_page(package: str, template: str, **values: Any) -> str:
    """The page that a template of `package`/templates makes of `values`.

    It extends base.html.jinja and takes its pieces from parts.html.jinja, both of this package. All
    values are escaped but `Markup`; a name that is not given is an error, never an empty text.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader(__package__)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(style=_style(), **values)


def _style() -> Markup:
    """The style sheet: phone and desktop, light and dark, screen and paper."""
    file = resources.files(__package__) / "templates" / "page.css"
    return Markup(file.read_text(encoding="utf-8"))
