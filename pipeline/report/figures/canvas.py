"""How every figure looks, and how it is saved.

Figures are made without pyplot and under a style of their own, so that a user's settings of matplotlib neither change
them nor are changed by them. No text is read as TeX or mathtext.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    "legend.borderpad": 0,
    "legend.frameon": False,
    "lines.markersize": 4,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
MISSING = "□"
MINUS = "\N{MINUS SIGN}"
LARGEST = 1e100  # an axis cannot hold larger numbers


@contextmanager
def figure_style() -> Iterator[None]:
    """Sets the style of the figures; at its end, matplotlib's settings are again what they were."""
    from matplotlib import style

    with style.context(["default", STYLE]):
        yield


def new_figure(width: float, height: float, title: str, subtitle: str) -> Figure:
    """An empty figure of `width` and `height` inches with a heading."""
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

    figure = Figure((width, height), layout="constrained")
    lines = wrap(clean(subtitle), int(15 * width - 3)) or [""]
    heading = figure.suptitle(shorten(title, int(10 * width)) + "\n" * len(lines), x=0.1 / width, ha="left", size=11)
    figure.add_artist(Annotation("\n".join(lines), (0, 0), xycoords=heading, va="bottom", color=GREY))
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


@lru_cache(maxsize=1)
def _glyphs() -> frozenset[int]:
    """The characters that both fonts have."""
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    files = (Path(get_data_path(), "fonts", "ttf", f"DejaVuSans{kind}.ttf") for kind in ("", "Mono"))
    return frozenset.intersection(*(frozenset(FT2Font(str(file)).get_charmap()) for file in files))


def clean(text: str) -> str:
    """The text in one line, with a box for what is not drawn from left to right, or not in the fonts.

    matplotlib would warn of each character that is missing.
    """
    letters = (" " if letter.isspace() else letter for letter in text)
    return "".join(letter if _can_be_drawn(letter) else MISSING for letter in letters)


def _can_be_drawn(letter: str) -> bool:
    odd = unicodedata.category(letter)[0] in "CM" or unicodedata.bidirectional(letter) in ("R", "AL")
    return ord(letter) in _glyphs() and not odd


def shorten(text: str, most: int = 24) -> str:
    """At most so many characters, cleaned; an ellipsis says that some are left out."""
    return clean(text if len(text) <= most else text[: most - 1] + "…")


def drawable(values: Any) -> npt.NDArray[np.float64]:
    """The numbers, with NaN for those that an axis cannot hold: NaN leaves a gap in a line."""
    numbers = np.asarray(values, dtype=np.float64)
    return np.where(np.abs(numbers) < LARGEST, numbers, np.nan)
