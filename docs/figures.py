"""Draws docs/how_it_works.svg and .png:  python docs/figures.py  (needs the extra `figures`)."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

HERE = Path(__file__).parent
INK, SOFT, LINE = "#222222", "#5f6670", "#8b929c"

# Okabe and Ito's palette, which colour-blind readers tell apart; text tokens are grey.
KINDS = {
    "text": ("#e4e6e9", "text token (fixed wording)"),
    "item": ("#56b4e9", "item node of the history"),
    "profile": ("#f0e442", "profile token"),
    "prediction": ("#e69f00", "prediction token"),
    "user": ("#009e73", "user node"),
    "slot": ("#cc79a7", "answer slot"),
}

# One prompt of an ordered history, as `PromptBuilder._assemble` lays it out: (what it says, kind).
PROMPT = [
    *[("[CLS]", "text"), ("history", "text"), (":", "text")],
    *[(f"$i_{n}$", "item") for n in range(1, 6)],
    *[("; likes", "text"), ("$p_1$", "profile"), ("$p_2$", "profile")],
    *[("; wants", "text"), ("$q_1$", "prediction"), ("$q_2$", "prediction")],
    *[("; user", "text"), ("$u$", "user")],
    *[("; next:", "text"), ("$s_1$", "slot"), ("$s_2$", "slot"), ("$s_3$", "slot")],
]
KIND = [kind for _, kind in PROMPT]

STATIONS = [
    ("Raw files", "interactions\nand item texts", "#ffffff"),
    ("Store", "filtered, split, tokenised;\nmemory-mapped arrays", "#ffffff"),
    ("LightGCN", "training edges only\n$\\rightarrow E_u,\\ E_i$, then frozen", "#ffffff"),
    ("Stage 2", "item–text alignment\ntrains $W_i$, slot, head", "#fbeff5"),
    ("Stage 3", "user–item alignment\ntrains all but nodes, LM", "#fbeff5"),
    ("Decoding", "first, slots or\nautoregressive", "#ffffff"),
    ("Full ranking", "all items but the history,\nbeside the run's baselines", "#ffffff"),
]

CELL, LEFT, CELLS_Y = 5.2, 2.0, 21.0  # of the drawn prompt; the canvas is 160 × 90


def main() -> None:
    plt.rcParams.update({"font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans", "svg.hashsalt": "raygrec"})
    figure = plt.figure(figsize=(16, 9), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 160), ylim=(0, 90))
    axes.set_axis_off()
    draw_stations(axes)
    draw_prompt(axes)
    draw_sources(axes)
    draw_answers(axes)
    draw_mask(axes, left=118.0, top=53.0, size=1.95)
    figure.savefig(HERE / "how_it_works.svg", metadata={"Date": None})
    figure.savefig(HERE / "how_it_works.png", dpi=120)


def draw_stations(axes: Axes) -> None:
    """The way of the data, left to right."""
    heading(axes, 2, 86, "a", "From raw files to recommendations")
    width, gap, bottom, height = 19.0, 3.8, 69.0, 13.0
    for number, (title, text, colour) in enumerate(STATIONS):
        left = 2 + number * (width + gap)
        box(axes, left, bottom, width, height, colour)
        axes.text(left + width / 2, bottom + 9.7, title, ha="center", va="center", size=13, weight="bold", color=INK)
        axes.text(
            left + width / 2,
            bottom + 4.4,
            text,
            ha="center",
            va="center",
            size=9.4,
            color=SOFT,
            linespacing=1.4,
        )
        if number:
            arrow(axes, (left - gap + 0.4, bottom + height / 2), (left - 0.4, bottom + height / 2))


def draw_prompt(axes: Axes) -> None:
    """The prompt as a row of cells under the language model."""
    heading(axes, 2, 63, "b", "One prompt, one forward pass")
    for place, (word, kind) in enumerate(PROMPT):
        cell = Rectangle((LEFT + place * CELL, CELLS_Y), CELL, CELL, facecolor=KINDS[kind][0], edgecolor="white", lw=2)
        axes.add_patch(cell)
        size = 13 if kind != "text" else 8.2
        axes.text(middle(place), CELLS_Y + CELL / 2, word, ha="center", va="center", size=size, color=INK)
        arrow(axes, (middle(place), CELLS_Y + CELL + 0.3), (middle(place), 29.7), width=0.9)
    box(axes, LEFT, 30, CELL * len(PROMPT), 6.5, "#eef1f4")
    axes.text(
        LEFT + CELL * len(PROMPT) / 2,
        33.2,
        "frozen language model",
        ha="center",
        va="center",
        size=13,
        color=INK,
    )


def draw_sources(axes: Axes) -> None:
    """Where the cells that are no fixed wording come from."""
    sources = [
        ("item", "item projector\n$V_i = W_i [E_i + \\delta_i ; t_i] + b_i$"),
        ("profile", "telling terms of\nthe history"),
        ("prediction", "… of its\nnewest items"),
        ("user", "user projector\n$V_u = W_u\\,u(H) + b_u$"),
        ("slot", "learned, plus newest\nitem and user"),
    ]
    for kind, text in sources:
        places = [place for place, other in enumerate(KIND) if other == kind]
        first, last = LEFT + places[0] * CELL + 0.5, LEFT + (places[-1] + 1) * CELL - 0.5
        axes.plot([first, first, last, last], [20, 19.2, 19.2, 20], color=LINE, lw=1.2, solid_joinstyle="miter")
        axes.text((first + last) / 2, 18.2, text, ha="center", va="top", size=10, color=INK, linespacing=1.5)
    for number, (colour, name) in enumerate(KINDS.values()):
        left, bottom = LEFT + (number % 3) * 36, 7.4 - (number // 3) * 4
        axes.add_patch(Rectangle((left, bottom), 2.2, 2.2, facecolor=colour))
        axes.text(left + 3.2, bottom + 1.0, name, va="center", size=10.5, color=SOFT)


def draw_answers(axes: Axes) -> None:
    """The head, its logits and what they must name, over the positions that answer."""
    random = np.random.default_rng(4)
    first, last = LEFT + KIND.index("item") * CELL, LEFT + len(KIND) * CELL
    box(axes, first, 39.6, last - first, 5.4, "#f3dbe8")
    axes.text((first + last) / 2, 42.2, "GLLM head", ha="center", va="center", size=13, color=INK)
    groups = (("item", 2, "ordered data: each item names the next"), ("slot", 6, "slots name the future"))
    for kind, first_target, title in groups:
        places = [place for place, other in enumerate(KIND) if other == kind]
        centre = (middle(places[0]) + middle(places[-1])) / 2
        axes.text(centre, 58.6, title, ha="center", va="center", size=10, color=SOFT)
        for number, place in enumerate(places):
            arrow(axes, (middle(place), 36.8), (middle(place), 39.3), width=0.9)
            arrow(axes, (middle(place), 45.3), (middle(place), 47.4), width=0.9)
            logits(axes, middle(place), 47.9, random)
            target = f"$i_{first_target + number}$"
            axes.text(middle(place), 55.7, target, ha="center", va="center", size=13, color=INK)
    text = "logits over all $|I|$ items;\ncross-entropy is the only loss"
    axes.text((first + last) / 2, 51, text, ha="center", va="center", size=10.5, color=SOFT, linespacing=1.6)


def draw_mask(axes: Axes, left: float, top: float, size: float) -> None:
    """Who may look at whom: a row reads the coloured columns."""
    heading(axes, left - 4, 63, "c", "Block-causal mask")
    axes.text(left - 4, 58.6, "a row reads the coloured columns", va="center", size=10, color=SOFT)
    tail = len(PROMPT)
    levels = np.array([0] * 3 + [1, 2, 3, 4, 5] + [tail] * (tail - 8))
    allowed = levels[:, None] >= levels[None, :]
    for row in range(tail):
        axes.add_patch(Rectangle((left - 2.9, top - (row + 1) * size), size, size, facecolor=KINDS[KIND[row]][0]))
        axes.add_patch(Rectangle((left + row * size, top + 0.95), size, size, facecolor=KINDS[KIND[row]][0]))
        for column in range(tail):
            colour = KINDS[KIND[column]][0] if allowed[row, column] else "#ffffff"
            corner = (left + column * size, top - (row + 1) * size)
            axes.add_patch(Rectangle(corner, size, size, facecolor=colour, edgecolor="#ffffff", lw=0.8))
    axes.add_patch(Rectangle((left, top - tail * size), tail * size, tail * size, fill=False, edgecolor=LINE, lw=1.2))
    note = (
        "A history item sees what stands before it; everything after\n"
        "the history sees the whole prompt (a causal LM lays its own\n"
        "triangle over this). Without an order, all see all."
    )
    axes.text(left - 4, top - tail * size - 2.2, note, va="top", size=9.4, color=SOFT, linespacing=1.5)


def logits(axes: Axes, centre: float, bottom: float, random: np.random.Generator) -> None:
    """A small histogram: logits over the catalogue, one item ahead."""
    heights = random.uniform(0.6, 2.6, 7)
    heights[random.integers(1, 6)] = 5.6
    for number, height in enumerate(heights):
        ahead = height == heights.max()
        corner = (centre - 1.75 + number * 0.5, bottom)
        axes.add_patch(Rectangle(corner, 0.4, height, facecolor="#d55e00" if ahead else "#b4bac2"))


def heading(axes: Axes, x: float, y: float, letter: str, title: str) -> None:
    axes.text(x, y, letter, size=15, weight="bold", color=INK, va="center")
    axes.text(x + 2.6, y, title, size=15, color=INK, va="center")


def box(axes: Axes, left: float, bottom: float, width: float, height: float, colour: str) -> None:
    style = "round,pad=0,rounding_size=1.0"
    axes.add_patch(FancyBboxPatch((left, bottom), width, height, style, facecolor=colour, edgecolor=LINE, lw=1.2))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], width: float = 1.6) -> None:
    properties = {
        "arrowstyle": "-|>",
        "color": LINE,
        "lw": width,
        "shrinkA": 0,
        "shrinkB": 0,
        "mutation_scale": 9,
    }
    axes.annotate("", xy=end, xytext=start, arrowprops=properties)


def middle(place: int) -> float:
    return LEFT + (place + 0.5) * CELL


if __name__ == "__main__":
    main()
