"""matplotlib figures as inline SVG that follows the page: its font, its colours, light or dark.

Figures are drawn in the fixed colours below; on the way out each becomes a CSS variable of the page. Text stays text,
and ids are salted with the figure's name, so the same results give the same bytes and no two figures share an id.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from robustbench_ext.files import write_atomically

INK, MUTED, GRID, PAPER = "#20242c", "#6b7280", "#dfe3ea", "#fefefe"
# Okabe and Ito's palette, without yellow: distinguishable with every common colour-vision deficiency.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | {
    colour: f"--c{i + 1}" for i, colour in enumerate(PALETTE)
}

STYLE: dict[str, Any] = {
    "figure.figsize": (4.4, 3.1),
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "text.color": INK,
    "svg.fonttype": "none",
    "text.parse_math": False,  # names come from users: a dollar sign is a dollar sign
    "figure.constrained_layout.use": True,
}


@contextmanager
def style() -> Iterator[None]:
    """The report's style, for figures drawn inside the block."""
    with mpl.rc_context(STYLE):
        yield


def draw(name: str, paint: Callable[[Axes], object], size: tuple[float, float] = (4.4, 3.1)) -> str:
    """Draw one Axes with `paint` and return it as themed SVG markup.

    Args:
        name: unique in the document; salts the ids.
    """
    with style(), mpl.rc_context({"svg.hashsalt": name}):
        figure = Figure(figsize=size)
        paint(figure.add_subplot())
        buffer = io.StringIO()
        # `savefig` would lay the figure out twice.
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return themed(buffer.getvalue())


def save(file: Path, paints: Sequence[Callable[[Axes], object]], size: tuple[float, float] = (4.4, 3.1)) -> None:
    """Write a figure that stands by itself, one Axes beside the other, each of that size, on a white ground.

    The same figure gives the same bytes.
    """
    with style(), mpl.rc_context({"svg.hashsalt": file.stem}):
        figure = Figure(figsize=(size[0] * len(paints), size[1]))
        for axes, paint in zip(figure.subplots(1, len(paints), squeeze=False)[0], paints, strict=True):
            paint(axes)
        nothing = {"Date": None, "Creator": None}
        write_atomically(file, lambda part: figure.savefig(part, format="svg", facecolor=PAPER, metadata=nothing))


def themed(svg: str) -> str:
    """The <svg> element alone, with the fixed colours replaced by the page's variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) xmlns:xlink="[^"]*"', r"\1", svg, count=1).replace("xlink:href", "href")
    svg = re.sub(r"font: ([^;\"]*?)px [^;\"]*", r"font-size: \1px", svg)
    # matplotlib numbers its groups from 1 in every figure; only ids that something refers to are kept (those are salted).
    referred = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: match.group(0) if match.group(1) in referred else "", svg)
    for colour, variable in _VARIABLES.items():
        svg = re.sub(re.escape(colour), f"var({variable})", svg, flags=re.I)
    return _compact(svg.strip())


def _compact(svg: str) -> str:
    """The same picture in half the bytes: coordinates to a tenth of a point, other numbers to a hundredth, no line breaks.

    Only tags are touched: text between them is data.
    """

    def shorter(tag: re.Match[str]) -> str:
        text = re.sub(r"\s+", " ", tag[0])
        text = re.sub(r' (?:d|points)="[^"]*"', lambda path: _rounded(path[0], 1), text)
        return _rounded(text, 2).replace(": ", ":").replace("; ", ";")

    svg = re.sub(r">\s+<", "><", svg)
    return re.sub(r"<(?!image)[^>]*>", shorter, svg)


def _rounded(text: str, digits: int) -> str:
    """Decimal numbers with at most so many decimals, without zeros at the end."""
    return re.sub(r"-?\d+\.\d+", lambda n: f"{float(n[0]):.{digits}f}".rstrip("0").rstrip("."), text)
