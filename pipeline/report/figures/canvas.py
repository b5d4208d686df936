"""What every picture has in common: a white sheet in inches, its fonts and its colours.

Nothing is taken from matplotlib's settings and nothing is changed there: they belong to the script that calls. Every
text is drawn as it is: neither TeX nor mathtext reads it.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.text import Text

DPI = 100
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # of Okabe and Ito: told apart by colour-blind readers
INK, GREY, PALE = "#222222", "#666666", "#dddddd"
SANS, MONO = "DejaVuSans.ttf", "DejaVuSansMono.ttf"  # matplotlib brings them
MISSING = "□"
MINUS = "\N{MINUS SIGN}"
LARGEST = 1e100  # numbers beyond are drawn no more than NaN is: an axis cannot hold them
HEAD = 0.75  # inches that the heading takes at the top


class Sheet:
    """A picture of `width` and `height` inches with two lines of heading; all its places are inches from below left."""

    def __init__(self, width: float, height: float, title: str, below: str) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure((width, height), dpi=DPI, facecolor="white")
        self.figure.set_layout_engine("none")
        self.canvas: Any = FigureCanvasAgg(self.figure)
        for text, size, color, y in ((title, 11, INK, 0.3), (below, 9, GREY, 0.52)):
            self.write(0.15, height - y, fitting(text, size, width - 0.3), size, color)

    def write(self, x: float, y: float, text: str, size: float = 8, color: str = INK, **options: Any) -> None:
        """Writes at a place of the sheet."""
        write(self.figure, x / self.width, y / self.height, text, size, color, **options)

    def axes(self, left: float, bottom: float, width: float, height: float, frame: bool = True) -> Axes:
        """Plain axes with few ticks; without `frame`, neither ticks nor lines nor background."""
        size = self.width, self.height, self.width, self.height
        edges = [edge / whole for edge, whole in zip((left, bottom, width, height), size, strict=True)]
        axes = self.figure.add_axes((edges[0], edges[1], edges[2], edges[3]))
        axes.set_facecolor("white")
        axes.grid(False, which="both")
        axes.minorticks_off()
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set(visible=frame and side in ("left", "bottom"), color=GREY, linewidth=0.8)
        if frame:
            ticks(axes)
        else:
            axes.set_axis_off()
        return axes

    def save(self, path: Path) -> Path:
        """Writes a PNG file of 256 colours, which takes a third of the space; gives its path."""
        from PIL import Image

        for axes in self.figure.axes:
            for axis in (axes.xaxis, axes.yaxis) if axes.axison else ():
                for text in axis.get_majorticklabels():
                    text.set(usetex=False, parse_math=False, fontproperties=font(8), color=INK)
        self.canvas.draw()
        picture = Image.fromarray(np.asarray(self.canvas.buffer_rgba())[:, :, :3].copy())
        picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path)
        return path


def ticks(axes: Axes, x: int = 5, y: int = 5, whole: bool = False) -> None:
    """About so many ticks on each axis, none for 0; with `whole`, only at whole numbers of x."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    for axis, most, integer in ((axes.xaxis, x, whole), (axes.yaxis, y, False)):
        options: dict[str, Any] = {"steps": [1, 2, 2.5, 5, 10], "integer": integer, "min_n_ticks": 1 if integer else 2}
        axis.set_major_locator(MaxNLocator(most, **options) if most else NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    shown: dict[str, Any] = {"which": "major", "direction": "out", "length": 3, "width": 0.8, "pad": 3, "color": GREY}
    axes.tick_params("x", bottom=bool(x), top=False, labelbottom=bool(x), labeltop=False, **shown)
    axes.tick_params("y", left=bool(y), right=False, labelleft=bool(y), labelright=False, **shown)


def write(
    where: Axes | Figure, x: float, y: float, text: str, size: float, color: str, file: str = SANS, **options: Any
) -> Text:
    """Writes at data or figure coordinates; `options` are those of matplotlib's `Text`."""
    how = {"fontproperties": font(size, file), "usetex": False, "parse_math": False, "color": color}
    return where.text(x, y, clean(text, file), **{**how, **options})


def label(axes: Axes, x: str, y: str) -> None:
    """Names the axes."""
    for axis, text in ((axes.xaxis, x), (axes.yaxis, y)):
        axis.labelpad = 4
        axis.label.set(text=clean(text), fontproperties=font(9), usetex=False, parse_math=False, color=INK)


def line(axes: Axes, x: Any, y: Any, color: str, width: float = 1, marker: str = "", **options: Any) -> None:
    """Draws a line with, or without, a small marker at each point."""
    how = {"linestyle": "-", "markersize": 4, "markeredgewidth": 0, "markerfacecolor": color}
    axes.plot(x, y, color=color, linewidth=width, marker=marker, **{**how, **options})


def font(size: float, file: str = SANS) -> FontProperties:
    """One of matplotlib's own fonts, by its file: no search, and whatever family is set."""
    from matplotlib import get_data_path
    from matplotlib.font_manager import FontProperties

    return FontProperties(fname=str(Path(get_data_path(), "fonts", "ttf", file)), size=size)


@lru_cache(maxsize=2)
def _glyphs(file: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(font(8, file).get_file())).get_charmap())


def clean(text: str, file: str = SANS) -> str:
    """The text in one line, with a box for what the font cannot show: matplotlib would warn of each."""
    known = _glyphs(file)
    letters = (" " if letter.isspace() else letter for letter in text)
    return "".join(a if ord(a) in known and unicodedata.category(a)[0] != "C" else MISSING for a in letters)


def cell(letter: str) -> str:
    """One character of a line in columns: a box for what is not exactly one column wide, left to right."""
    odd = unicodedata.category(letter)[0] == "M" or unicodedata.bidirectional(letter) in ("R", "AL")
    return MISSING if odd else clean(letter, MONO)


def extent(text: str, size: float, file: str = SANS) -> float:
    """Inches that a text takes."""
    from matplotlib.backends.backend_agg import RendererAgg

    renderer: Any = RendererAgg  # the class has no types
    width = renderer(1, 1, DPI).get_text_width_height_descent(clean(text, file), font(size, file), False)[0]
    return float(width) / DPI


def fitting(text: str, size: float, width: float) -> str:
    """The text, cut to `width` inches."""
    text = shorten(text, 200)
    while (found := extent(text, size)) > width and len(text) > 1:
        text = shorten(text, max(1, min(len(text) - 1, int(len(text) * width / found))))
    return text


def shorten(text: str, most: int = 24) -> str:
    """The first characters, with an ellipsis where some are left out."""
    return text if len(text) <= most else text[: most - 1] + "…"


def number(value: float) -> str:
    """Six digits at most, with a real minus."""
    return f"{value:.6g}".replace("-", MINUS)


def drawable(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which numbers an axis can hold."""
    return np.asarray(np.abs(values) < LARGEST)  # a NaN is not


def span(*values: npt.NDArray[Any] | Sequence[float]) -> tuple[float, float]:
    """Limits of an axis that holds all of them, with room at both ends; at least one number, all drawable."""
    everything = np.concatenate([np.asarray(some, dtype=np.float64) for some in values])
    low, high = float(everything.min()), float(everything.max())
    size = max(abs(low), abs(high))
    room = 0.05 * (high - low)
    if high - low <= max(1e-9 * size, 1 / LARGEST):  # equal, as good as
        room = 0.1 * size if size > math.sqrt(1 / LARGEST) else 1.0
    return low - room, high + room
