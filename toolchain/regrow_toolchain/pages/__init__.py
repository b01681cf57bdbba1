"""Pages and tables for people: templates, one style sheet, charts as inline SVG."""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .axis import Axis as Axis
    from .axis import linear_axis as linear_axis
    from .axis import log_axis as log_axis
    from .canvas import MARGIN as MARGIN
    from .canvas import Canvas as Canvas
    from .canvas import Colour as Colour
    from .charts import Row as Row
    from .charts import Series as Series
    from .charts import dense_row_chart as dense_row_chart
    from .charts import line_chart as line_chart
    from .charts import row_chart as row_chart
    from .formatting import GAP as GAP
    from .formatting import NOT_MEASURED as NOT_MEASURED
    from .formatting import count as count
    from .formatting import duration as duration
    from .formatting import percent as percent
    from .formatting import ram as ram
    from .formatting import ratio as ratio
    from .formatting import size as size
    from .marks import Bar as Bar
    from .marks import Change as Change
    from .marks import Histogram as Histogram
    from .marks import Post as Post
    from .marks import Spread as Spread
    from .page import render_page as render_page
    from .parts import Panel as Panel
    from .parts import Table as Table
    from .parts import Tile as Tile
    from .text_table import table as table
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".axis": ("Axis", "linear_axis", "log_axis"),
            ".canvas": ("MARGIN", "Canvas", "Colour"),
            ".charts": ("Row", "Series", "dense_row_chart", "line_chart", "row_chart"),
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
            ".marks": ("Bar", "Change", "Histogram", "Post", "Spread"),
            ".page": ("render_page",),
            ".parts": ("Panel", "Table", "Tile"),
            ".text_table": ("table",),
        },
    )
