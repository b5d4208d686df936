"""How every figure looks, and how it is saved."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Numbers = npt.NDArray[np.float64]
INK, GREY = "#222222", "#666666"
STYLE = {
    "axes.edgecolor": GREY,
    "axes.prop_cycle": "cycler('color', ['0072B2', 'D55E00', '009E73'])",  # Okabe and Ito's, for the colour-blind
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.dpi": 100,
    "font.family": "DejaVu Sans",  # matplotlib brings it
    "font.size": 9,
    "legend.frameon": False,
    "lines.markersize": 4,
    "text.color": INK,
    "text.parse_math": False,  # a `$` in a name starts no formula
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
LARGEST = 1e100  # an axis cannot hold larger numbers


@contextmanager
def figure_style() -> Iterator[None]:
    """Figures made within look the same whatever the user's settings of matplotlib, which are restored at the end."""
    from matplotlib import style

    with style.context(["default", STYLE]), warnings.catch_warnings():
        # A character that the font does not have is drawn as a box.
        warnings.filterwarnings("ignore", "Glyph .* missing|Matplotlib currently does not support")
        yield


def new_figure(width: float, height: float, title: str, subtitle: str, kind: type[Figure] | None = None) -> Figure:
    """An empty figure of `width` and `height` inches with a heading, of the class `kind`; pyplot does not know it."""
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

    figure = (kind or Figure)((width, height), layout="constrained")
    below = fill(subtitle, int(15 * width - 3))
    room = "\n" * (below.count("\n") + 1)  # the layout leaves space for one heading alone
    heading = figure.suptitle(shorten(title, int(10 * width)) + room, x=0.1 / width, ha="left", size=11)
    figure.add_artist(Annotation(below, (0, 0), xycoords=heading, va="bottom", color=GREY))
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Writes a PNG file of 256 colours, which takes a third of the space; returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3].copy())
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path)
    return path


def shorten(text: str, most: int = 24) -> str:
    """The text in one line of at most so many characters; an ellipsis says that some are left out."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def drawable(values: Any) -> Numbers:
    """The numbers, with NaN for those that an axis cannot hold: NaN leaves a gap in a line."""
    numbers = np.asarray(values, dtype=np.float64)
    return np.where(np.abs(numbers) < LARGEST, numbers, np.nan)
