"""Pages and tables for people: one style sheet, charts as inline SVG. Needs only Python."""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .canvas import WIDTH as WIDTH
    from .canvas import Canvas as Canvas
    from .formatting import GAP as GAP
    from .formatting import NOT_MEASURED as NOT_MEASURED
    from .formatting import count as count
    from .formatting import duration as duration
    from .formatting import percent as percent
    from .formatting import ram as ram
    from .formatting import ratio as ratio
    from .formatting import size as size
    from .html import chips as chips
    from .html import definitions as definitions
    from .html import document as document
    from .html import figure as figure
    from .html import key as key
    from .html import paragraphs as paragraphs
    from .html import scroll_table as scroll_table
    from .html import tiles as tiles
    from .style_sheet import style as style
    from .text_table import table as table
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".canvas": ("Canvas", "WIDTH"),
            ".formatting": (
                "GAP",
                "NOT_MEASURED",
                "count",
                "duration",
                "percent",
                "ram",
                "ratio",
                "size",
            ),
            ".html": (
                "chips",
                "definitions",
                "document",
                "figure",
                "key",
                "paragraphs",
                "scroll_table",
                "tiles",
            ),
            ".style_sheet": ("style",),
            ".text_table": ("table",),
        },
    )
