"""Figures as plain marks, drawn twice: as an interactive plotly figure and as a PNG by matplotlib.

Positions are those of the drawing: a logarithmic axis holds log10 of its values and the ticks say what they mean
(`Scale`), so both renderers only know straight axes.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from matplotlib.axes import Axes

INK, SOFT, GRID = "#222222", "#5f6670", "#e4e6e9"
Tick = tuple[float, str]
Symbol = Literal["dot", "ring", "cross", "triangle", "below", "above"]

_PLOTLY_SYMBOLS = {
    "dot": "circle",
    "ring": "circle-open",
    "cross": "x-thin-open",
    "triangle": "triangle-right-open",
    "below": "triangle-down-open",
    "above": "triangle-up-open",
}
_MATPLOTLIB_SYMBOLS = {"dot": "o", "ring": "o", "cross": "x", "triangle": ">", "below": "v", "above": "^"}
# For each side of a label: the ends of the text that lie at the place, and by how many pixels it is moved away.
_SIDES = {
    "right": ("left", "center", 9, 0),
    "left": ("right", "center", -7, 0),
    "center": ("center", "center", 0, 0),
    "above": ("center", "bottom", 0, 8),
    "above left": ("right", "bottom", -5, 4),
    "below left": ("right", "top", -5, -4),
}


@dataclass(frozen=True)
class Line:
    """Straight pieces through (x, y); NaN breaks it."""

    x: Sequence[float]
    y: Sequence[float]
    colour: str
    width: float = 1.5
    dashed: bool = False
    hover: str = ""


@dataclass(frozen=True)
class Points:
    """One symbol at each (x, y), with a text each for the pointer."""

    x: Sequence[float]
    y: Sequence[float]
    colour: str
    symbol: Symbol = "dot"
    size: float = 7
    hover: Sequence[str] = ()


@dataclass(frozen=True)
class Band:
    """The area between `low` and `high` along x."""

    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    colour: str
    opacity: float = 0.15


@dataclass(frozen=True)
class Label:
    """Words at a place; `side` is where they lie as seen from it."""

    x: float
    y: float
    text: str
    colour: str = INK
    side: Literal["left", "right", "center", "above", "above left", "below left"] = "right"
    bold: bool = False
    size: int = 12


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, with ticks (position, text); without any it is not drawn at all."""

    low: float
    high: float
    ticks: Sequence[Tick] = ()
    title: str = ""
    slanted: bool = False


@dataclass(frozen=True)
class Panel:
    """Marks over one pair of axes, drawn in their order."""

    x: Axis
    y: Axis
    marks: list[Line | Points | Band | Label] = field(default_factory=list)


@dataclass(frozen=True)
class Drawing:
    """A titled grid of panels; `note` says how to read it. height: pixels of one row."""

    name: str
    title: str
    note: str
    panels: list[Panel]
    columns: int = 1
    height: int = 420

    @property
    def rows(self) -> int:
        return math.ceil(len(self.panels) / self.columns)


@dataclass(frozen=True)
class Scale:
    """Where a value lies on an axis: evenly, by log10, or one step per category."""

    kind: Literal["even", "log", "categories"]
    low: float
    high: float
    categories: tuple = ()

    @classmethod
    def over(cls, values: Sequence[float], log: bool = False) -> "Scale":
        """An axis that just holds finite `values`, with a margin."""
        placed = np.log10(np.asarray(values, float)) if log else np.asarray(values, float)
        low, high = (float(placed.min()), float(placed.max())) if len(placed) else (0.0, 1.0)
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
        return cls("log" if log else "even", low - margin, high + margin)

    @classmethod
    def of_categories(cls, values: Sequence) -> "Scale":
        return cls("categories", -0.6, len(values) - 0.4, tuple(values))

    def place(self, value: object) -> float:
        if self.kind == "categories":
            return float(self.categories.index(value))
        return math.log10(value) if self.kind == "log" else float(value)

    def ticks(self, most: int = 5) -> list[Tick]:
        if self.kind == "categories":
            return [(float(place), shortened(value)) for place, value in enumerate(self.categories)]
        if self.kind == "even":
            return even_ticks(self.low, self.high, most)
        return _log_ticks(self.low, self.high, most)

    def axis(self, title: str = "", most: int = 5) -> Axis:
        ticks = self.ticks(most)
        crowded = self.kind == "categories" and sum(len(text) + 2 for _, text in ticks) > 30
        return Axis(self.low, self.high, ticks, title, crowded)


def number(value: float) -> str:
    """Four digits, whole numbers as they are: `0.01234`, `65536`, `1e-5`; a dash for what is not finite."""
    if not math.isfinite(value):
        return "–"
    text = str(int(value)) if value == int(value) and abs(value) < 1e7 else f"{value:.4g}"
    return text.replace("e-0", "e-").replace("e+0", "e")


def shortened(value: object, most: int = 16) -> str:
    """A value as it stands on an axis."""
    text = number(value) if isinstance(value, int | float) else str(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def even_ticks(low: float, high: float, most: int = 5) -> list[Tick]:
    """Round numbers between `low` and `high`."""
    from matplotlib.ticker import MaxNLocator

    places = MaxNLocator(most, steps=[1, 2, 5, 10]).tick_values(low, high)
    digits = 6 if len(places) < 2 or abs(places[1] - places[0]) > 1e-4 * max(abs(low), abs(high)) else 9
    return [(float(at), f"{at:.{digits}g}".replace("e-0", "e-")) for at in places if low <= at <= high]


def _log_ticks(low: float, high: float, most: int) -> list[Tick]:
    """Powers of ten; with few of them in sight also their multiples by 2 and 5, or by 3."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    found: list[float] = []
    for factors in ((1,), (1, 3), (1, 2, 5)):
        more = [f * 10.0**d for d in decades for f in factors if low <= math.log10(f) + d <= high]
        if len(more) <= most:
            found = more
    if not found:  # too many decades for the room: every second, third … of them
        inside = [10.0**d for d in decades if low <= d <= high]
        found = inside[:: math.ceil(len(inside) / most)]
    return [(math.log10(value), number(value)) for value in found]


def plotly_figure(drawing: Drawing) -> "go.Figure":
    """The drawing without its title and note, which the page says itself."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    rows, columns = drawing.rows, drawing.columns
    height = drawing.height * rows + 20
    figure = make_subplots(
        rows, columns, horizontal_spacing=0.045 if columns > 1 else 0, vertical_spacing=min(0.9 / rows, 85 / height)
    )
    labels: list[dict] = []
    for place, panel in enumerate(drawing.panels):
        cell = {"row": place // columns + 1, "col": place % columns + 1}
        traces = [_trace(mark, go) for mark in panel.marks if not isinstance(mark, Label)]
        figure.add_traces(traces, rows=cell["row"], cols=cell["col"])
        axes = str(place + 1) if place else ""  # plotly's names: x, x2, x3 … row by row
        labels += [
            {**_annotation(mark), "xref": f"x{axes}", "yref": f"y{axes}"}
            for mark in panel.marks
            if isinstance(mark, Label)
        ]
        figure.update_xaxes(_plotly_axis(panel.x), tickangle=-35 if panel.x.slanted else 0, **cell)
        figure.update_yaxes(_plotly_axis(panel.y), **cell)
    figure.update_layout(
        template="none",
        height=height,
        annotations=labels,
        showlegend=False,
        hovermode="closest",
        font={"family": "system-ui, 'DejaVu Sans', sans-serif", "size": 12, "color": INK},
        margin={"l": 60, "r": 20, "t": 15, "b": 50 if drawing.panels[0].x.title else 15},
        paper_bgcolor="white",
        plot_bgcolor="white",
    )
    for cell in range(len(drawing.panels), rows * columns):
        where = {"row": cell // columns + 1, "col": cell % columns + 1}
        figure.update_xaxes(visible=False, **where)
        figure.update_yaxes(visible=False, **where)
    return figure


def _plotly_axis(axis: Axis) -> dict:
    return {
        "range": [axis.low, axis.high],
        "visible": bool(axis.ticks or axis.title),
        "tickvals": [place for place, _ in axis.ticks],
        "ticktext": [escape(text) for _, text in axis.ticks],
        "title": {"text": escape(axis.title), "standoff": 8},
        "gridcolor": GRID,
        "linecolor": SOFT,
        "zeroline": False,
        "automargin": True,
    }


def _trace(mark: Line | Points | Band, go: object) -> object:
    """plotly reads texts as a kind of HTML, hence the escapes."""
    if isinstance(mark, Band):
        return go.Scatter(
            x=[*mark.x, *reversed(mark.x)],
            y=[*mark.low, *reversed(mark.high)],
            fill="toself",
            fillcolor=mark.colour,
            opacity=mark.opacity,
            mode="none",
            hoverinfo="skip",
        )
    if isinstance(mark, Line):
        return go.Scatter(
            x=list(mark.x),
            y=list(mark.y),
            mode="lines",
            line={"color": mark.colour, "width": mark.width, "dash": "4px,3px" if mark.dashed else "solid"},
            text=_hover(mark.hover),
            hoverinfo="text" if mark.hover else "skip",
        )
    return go.Scatter(
        x=list(mark.x),
        y=list(mark.y),
        mode="markers",
        marker={
            "symbol": _PLOTLY_SYMBOLS[mark.symbol],
            "color": mark.colour,
            "size": mark.size,
            "line": {"width": 1.5, "color": mark.colour} if mark.symbol != "dot" else {"width": 0},
            "opacity": 0.85,
        },
        text=[_hover(text) for text in mark.hover],
        hoverinfo="text" if mark.hover else "skip",
        cliponaxis=False,
    )


def _annotation(label: Label) -> dict:
    across, up, right, above = _SIDES[label.side]
    text = escape(label.text)
    return {
        "x": label.x,
        "y": label.y,
        "text": f"<b>{text}</b>" if label.bold else text,
        "xanchor": across,
        "yanchor": "middle" if up == "center" else up,
        "xshift": right,
        "yshift": above,
        "font": {"color": label.colour, "size": label.size},
        "bgcolor": "rgba(255,255,255,0.75)",
        "borderpad": 0,
        "showarrow": False,
    }


def _hover(text: str) -> str:
    return "<br>".join(escape(line) for line in text.splitlines())


def png(drawing: Drawing, dpi: int = 150) -> bytes:
    """The drawing with title and note, as a PNG 12.4 inches wide."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {"font.family": "DejaVu Sans", "text.parse_math": False, "axes.linewidth": 0.8}
    with matplotlib.rc_context(settings):
        note = textwrap.fill(drawing.note, 150)
        inches = (drawing.height * drawing.rows + 60) / 100
        heading = 0.5 + 0.17 * (note.count("\n") + 1) + 0.1
        total = inches + heading
        figure = Figure(figsize=(12.4, total), facecolor="white", layout="constrained")
        figure.get_layout_engine().set(rect=(0.005, 0.0, 0.99, inches / total), hspace=0.05, wspace=0.03)
        figure.text(0.012, 1 - 0.14 / total, drawing.title, size=15, weight="bold", color=INK, va="top")
        figure.text(0.012, 1 - 0.45 / total, note, size=9.5, color=SOFT, va="top", linespacing=1.35)
        grid = figure.subplots(drawing.rows, drawing.columns, squeeze=False).ravel()
        for axes in grid[len(drawing.panels) :]:
            axes.set_axis_off()
        for axes, panel in zip(grid, drawing.panels, strict=False):
            _draw_panel(axes, panel)
        target = BytesIO()
        figure.savefig(target, format="png", dpi=dpi, metadata={"Software": None})
    return target.getvalue()


def _draw_panel(axes: "Axes", panel: Panel) -> None:
    for level, mark in enumerate(panel.marks, start=3):
        _draw(axes, mark, level)
    axes.set(xlim=(panel.x.low, panel.x.high), ylim=(panel.y.low, panel.y.high))
    slant = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if panel.x.slanted else {}
    axes.set_xticks([at for at, _ in panel.x.ticks], [text for _, text in panel.x.ticks], **slant)
    axes.set_yticks([at for at, _ in panel.y.ticks], [text for _, text in panel.y.ticks])
    axes.set_xlabel(panel.x.title, color=INK, size=10.5)
    axes.set_ylabel(panel.y.title, color=INK, size=10.5)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for side, axis in (("bottom", panel.x), ("left", panel.y)):
        axes.spines[side].set_color(SOFT)
        axes.spines[side].set_visible(bool(axis.ticks or axis.title))


def _draw(axes: "Axes", mark: Line | Points | Band | Label, level: int) -> None:
    if isinstance(mark, Band):
        axes.fill_between(mark.x, mark.low, mark.high, color=mark.colour, alpha=mark.opacity, lw=0, zorder=level)
    elif isinstance(mark, Line):
        style = (0, (4, 3)) if mark.dashed else "-"
        axes.plot(mark.x, mark.y, color=mark.colour, lw=mark.width * 0.8, ls=style, zorder=level)
    elif isinstance(mark, Points):
        face = "none" if mark.symbol not in ("dot", "cross") else mark.colour
        edge = {} if mark.symbol == "cross" else {"edgecolors": mark.colour}
        axes.scatter(
            mark.x,
            mark.y,
            s=(mark.size * 0.8) ** 2,
            marker=_MATPLOTLIB_SYMBOLS[mark.symbol],
            facecolors=face,
            linewidths=0 if mark.symbol == "dot" else 1.2,
            alpha=0.85,
            zorder=level,
            clip_on=False,
            **edge,
        )
    else:
        across, up, right, above = _SIDES[mark.side]
        axes.annotate(
            mark.text,
            (mark.x, mark.y),
            (right * 0.8, above * 0.8),
            textcoords="offset points",
            ha=across,
            va=up,
            color=mark.colour,
            size=mark.size * 0.8,
            weight="bold" if mark.bold else "normal",
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.5},
            zorder=level,
            annotation_clip=False,
        )
