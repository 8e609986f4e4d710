"""What the pictures share: colours, sizes, and how a picture becomes a file."""

import io
import re
from collections.abc import Callable
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from planner.spec.errors import UserError
from planner.spec.files import write_atomic

# Okabe and Ito's palette, which people with colour blindness can tell apart
# (https://jfly.uni-koeln.de/color/).
BLUE = "#0072B2"
SKY = "#56B4E9"
GREEN = "#009E73"
YELLOW = "#F0E442"
ORANGE = "#E69F00"
VERMILION = "#D55E00"
PINK = "#CC79A7"

GREY = "#9A9A9A"
INK = "#333333"  # of words and thin lines
AXIS_INK = "#888888"

CHART_FONT = 9
DPI = 130


def new_chart(width: float, height: float, title: str) -> Figure:
    """An empty chart of a size in inches."""
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontweight="bold", fontsize=CHART_FONT + 2)
    return figure


def hide_frame(axis: Axes, *sides: str) -> None:
    """Take away some sides of the box around an axis: top, right, bottom, left."""
    for side in sides:
        axis.spines[side].set_visible(False)


def format_of(path: Path) -> str:
    """The picture format that a file name asks for. Raises UserError."""
    suffix = path.suffix.removeprefix(".").lower()
    if suffix not in ("png", "svg", "pdf"):
        raise UserError(f"{path}: a picture is a .png, .svg or .pdf file; choose one of these")
    return suffix


def rendered(figure: Figure, file_format: str) -> bytes:
    """The bytes of a picture file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file_format, dpi=DPI)
    return buffer.getvalue()


def inline_svg(render: Callable[[], bytes], name: str) -> str:
    """A picture as an element of an HTML page: its letters stay letters, and its parts are called
    otherwise than those of any other picture. `render` gives it as SVG."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        text = render().decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text[text.index("<svg") :]


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, SVG or PDF file (by its suffix). Raises UserError if it cannot be written."""
    write_atomic(path, rendered(figure, format_of(path)))
