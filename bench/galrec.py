"""GAL-Rec's figures: what its hops look like, what its settings do.

    python -m bench.galrec hops RUN …        2-D distribution, uniformity and alignment of finished runs' hops
    python -m bench.galrec degrees RUN …     N@10 of finished runs of one store by how well known the target is
    python -m bench.galrec matching RUN …    what tells whose two-hop representation is whose
    python -m bench.galrec effects           of τ, queue length and neighbour counts, from the files of `galrec-parts`

Figures go to docs/figures/, numbers to docs/results/. Needs the extra `figures`.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bench.quality import RESULTS, ROOT, SUITES
from bench.report import effects_of, read_results

FIGURES = ROOT / "docs" / "figures"
COLOURS = ("#0072b2", "#e69f00", "#009e73")
NAMES = ("0-hop: the user's own node", "1-hop: its items", "2-hop: users who share items")
DEGREES = (0, 3, 6, 12, 25, 50)  # users that a test target has in training, from so many on
LABELS = {
    "model.contrast.temperature": "temperature τ",
    "model.contrast.queue": "queue length K",
    "model.neighbours.one_hop": "one-hop neighbours of an item",
    "model.neighbours.two_hop": "two-hop neighbours",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    seen = commands.add_parser("hops")
    seen.add_argument("runs", type=Path, nargs="+")
    seen.add_argument("--users", type=int, default=3000)
    known = commands.add_parser("degrees")
    known.add_argument("runs", type=Path, nargs="+")
    matched = commands.add_parser("matching")
    matched.add_argument("runs", type=Path, nargs="+")
    matched.add_argument("--users", type=int, default=2560)
    commands.add_parser("effects")
    arguments = parser.parse_args()
    FIGURES.mkdir(exist_ok=True)
    if arguments.command == "hops":
        hops(arguments.runs, arguments.users)
    elif arguments.command == "degrees":
        degrees(arguments.runs)
    elif arguments.command == "matching":
        matching(arguments.runs, arguments.users)
    else:
        effects()


def hops(runs: list[Path], count: int) -> None:
    """Representations on the circle: first two principal directions of all hops, each row scaled to length 1."""
    found = [hops_of(run, count) for run in runs]
    draw_hops(found)
    command = f"python -m bench.galrec hops {' '.join(map(str, runs))}"
    write("galrec_hops.json", {"command": command, "users": count, "runs": [figures for figures, _ in found]})


def hops_of(run: Path, count: int) -> tuple[dict[str, Any], np.ndarray]:
    """Store, λ1 to λ3 and `hop_figures` of a run, and its [users, 3, 2] hops on the circle."""
    import torch

    from raygrec.draws import Draws
    from raygrec.evaluate.hops import hop_figures, hop_representations
    from raygrec.serve.topk import FinishedRun

    finished = FinishedRun(run)
    users = np.flatnonzero(finished.shown.lengths)
    users = np.sort(users[Draws(0).permutation(len(users))[:count]])
    train = finished.store.interactions("train")
    hops_nhD = hop_representations(finished.model, finished.builder, users, train)
    units = torch.nn.functional.normalize(hops_nhD, dim=2)
    flat = units.flatten(0, 1)
    _, _, directions = torch.pca_lowrank(flat, q=2, niter=8)
    plane = torch.nn.functional.normalize((units - flat.mean(0)) @ directions, dim=2).numpy()
    told = {"store": finished.store.path.name, "lambdas": weights_of(finished)}
    return told | hop_figures(hops_nhD), plane


def weights_of(finished: Any) -> list[float]:
    """λ1 to λ3."""
    contrast = finished.config.model.contrast
    return [contrast.l1, contrast.l2, contrast.l3]


def draw_hops(found: list[tuple[dict[str, Any], np.ndarray]]) -> None:
    import matplotlib.pyplot as plt
    from scipy.ndimage import gaussian_filter, gaussian_filter1d

    size, heights = (11, 5.2 * len(found)), [3, 1] * len(found)
    figure, rows = plt.subplots(2 * len(found), 3, figsize=size, height_ratios=heights, layout="constrained")
    edges, around = np.linspace(-1.25, 1.25, 121), np.linspace(-np.pi, np.pi, 241)
    middles, angles = (edges[1:] + edges[:-1]) / 2, (around[1:] + around[:-1]) / 2
    for number, (figures, plane) in enumerate(found):
        for hop, (name, colour) in enumerate(zip(NAMES, COLOURS, strict=True)):
            points = plane[:, hop].T
            density = gaussian_filter(np.histogram2d(points[1], points[0], bins=(edges, edges))[0], sigma=4)
            top, below = rows[2 * number : 2 * number + 2, hop]
            top.contourf(middles, middles, density, levels=12, cmap="Greys")
            top.set(title=name, aspect="equal", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
            top.title.set_color(colour)
            turned = np.histogram(np.arctan2(points[1], points[0]), bins=around, density=True)[0]
            turned = gaussian_filter1d(turned, sigma=5, mode="wrap")
            below.fill_between(angles, turned, color=colour, alpha=0.8, lw=0)
            below.set(xlim=(-np.pi, np.pi), xlabel=f"angle; uniformity {figures[f'uniformity {hop}-hop']:.2f}")
            below.set_ylim(bottom=0)
        pairs = ", ".join(f"{pair} {figures[f'alignment {pair}']:.2f}" for pair in ("0-hop 2-hop", "1-hop 2-hop"))
        weights = ", ".join(f"{weight:g}" for weight in figures["lambdas"])
        rows[2 * number, 0].set_ylabel(f"λ1, λ2, λ3 = {weights}\nalignment: {pairs}")
    figure.suptitle("Users' hop representations, first two principal directions", fontsize=11)
    figure.savefig(FIGURES / "galrec_hops.png", dpi=130)
    print(FIGURES / "galrec_hops.png")


def degrees(runs: list[Path]) -> None:
    """Test N@10 of users whose target has so many users in training, for each run; all users' difference to the first.

    A user's test target is one item, so its N@10 is 1 / log2(1 + rank) within the first ten. The standard error of a
    difference is that over users, who are the same in both runs: seeds do not show it.
    """
    from raygrec.serve.topk import FinishedRun

    finished = [FinishedRun(run) for run in runs]
    stores = {one.store.fingerprint for one in finished}
    if len(stores) > 1 or len({run.name for run in runs}) < len(runs):
        raise SystemExit("degrees compares runs of one store that have names of their own")
    store = finished[0].store
    targets = store.interactions("test")
    users = np.flatnonzero(targets.lengths)
    wanted = np.asarray(targets.indices)[targets.indptr[users]]
    known = store.interactions("train", by="item").lengths[wanted]
    group = np.searchsorted(DEGREES, known, side="right") - 1
    found: dict[str, list[float | None]] = {}
    gains: dict[str, np.ndarray] = {}
    for run, one in zip(runs, finished, strict=True):
        hits = one.top(users, 10)[0].numpy() == wanted[:, None]
        gains[run.name] = mine = (hits / np.log2(2 + np.arange(10))).sum(1)
        of = [mine[group == number] for number in range(len(DEGREES))]
        found[run.name] = [float(some.mean()) if len(some) else None for some in of]
    first = gains[runs[0].name]
    apart = {name: mine - first for name, mine in gains.items() if mine is not first}
    paired = {name: [float(by.mean()), float(by.std(ddof=1) / len(by) ** 0.5)] for name, by in apart.items()}
    told = {"command": f"python -m bench.galrec degrees {' '.join(map(str, runs))}", "store": store.path.name}
    counts = np.bincount(group, minlength=len(DEGREES)).tolist()
    write("galrec_degrees.json", {**told, "from": list(DEGREES), "users": counts, "ndcg@10": found, "apart": paired})


def matching(runs: list[Path], count: int) -> None:
    """Of each run: how well a user's 0-hop and 1-hop representation find its 2-hop one among those of 128 users.

    Then with the two-hop segments passed on from user to user in the prompts of the 2-hop side: whether it is found
    by the rest of its prompt, or by its two-hop neighbours. Nothing is dropped out, and there is no queue.
    """
    found = {run.name: matched_hops(run, count) for run in runs}
    command = f"python -m bench.galrec matching {' '.join(map(str, runs))}"
    write("galrec_matching.json", {"command": command, "users": count, "runs": found})


def matched_hops(run: Path, count: int) -> dict[str, Any]:
    """{anchor's hop: {what the two share: share of anchors that find it first, and mean InfoNCE}}."""
    import torch
    from torch.nn.functional import cross_entropy, normalize

    from raygrec.draws import Draws
    from raygrec.serve.topk import FinishedRun

    finished = FinishedRun(run)
    model, train, config = finished.model, finished.store.interactions("train"), finished.config.model
    users = np.flatnonzero(train.lengths >= 2)
    users = users[Draws(0).permutation(len(users))[:count]]
    told: dict[str, dict[str, Any]] = {}
    sums: dict[tuple[int, str], list[float]] = {}
    for part in np.array_split(users, -(-len(users) // 128)):
        prompts = finished.builder.describing(part, train.take(part), Draws(0))
        changed, rows = passed_on(prompts, config.neighbours.two_hop)
        with torch.no_grad():
            own, other = (normalize(model.representations(one)[rows].float(), dim=2) for one in (prompts, changed))
        mine = torch.arange(len(rows))
        cases = {
            "whole prompt": (own, mine),
            "node and items": (other, mine),
            "two-hop neighbours": (other, mine.roll(1)),
        }
        for hop in (0, 1):
            for name, (candidates, wanted) in cases.items():
                scores = own[:, hop] @ candidates[:, 2].T / config.contrast.temperature
                total = sums.setdefault((hop, name), [0.0, 0.0, 0.0])
                total[0] += float((scores.argmax(1) == wanted).sum())
                total[1] += float(cross_entropy(scores, wanted, reduction="sum"))
                total[2] += len(rows)
    for (hop, name), (first, loss, number) in sums.items():
        told.setdefault(f"{hop}-hop", {})[name] = {"first": first / number, "loss": loss / number}
    return {"epochs": finished.config.train.epochs, "lambdas": weights_of(finished), "found": told}


def passed_on(prompts: Any, count: int) -> tuple[Any, np.ndarray]:
    """The prompts, in each the two-hop nodes of the next one that has `count` of them; which ones have: the others stay
    as they are."""
    hops = prompts.hops.numpy()
    rows = np.flatnonzero(hops[:, 2] - hops[:, 1] == count + 1)
    places = hops[rows, 1][:, None] + np.arange(1, count + 1)
    symbols = prompts.symbols.flatten().clone()
    symbols[places] = symbols[np.roll(places, -1, axis=0)]
    return replace(prompts, symbols=symbols.view_as(prompts.symbols)), rows


def effects() -> None:
    """N@10 by the values of each key, as differences to the job's run with the same seed: seeds have validation users
    of their own."""
    import matplotlib.pyplot as plt

    found = effects_of(SUITES["galrec-parts"], read_results(RESULTS / "galrec-parts"))
    figure, panels = plt.subplots(1, len(found), figsize=(12, 3.4), sharey=True, layout="constrained")
    for panel, (key, points) in zip(panels, found.items(), strict=True):
        places = range(len(points))
        for split, colour in (("valid", COLOURS[0]), ("test", COLOURS[1])):
            means = [statistics.fmean(point[split]) for point in points]
            spread = [statistics.stdev(point[split]) if len(point[split]) > 1 else 0.0 for point in points]
            panel.errorbar(places, means, spread, color=colour, marker="o", capsize=3, label=split)
        panel.axhline(0, color="black", lw=0.8)
        panel.set_xticks(places, [f"{point['value']:g}" for point in points])
        panel.set_xlabel(LABELS[key])
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("N@10, apart from the job's")
    panels[0].legend(frameon=False)
    seeds = [len(point["test"]) for points in found.values() for point in points]
    least, most = min(seeds), max(seeds)
    over = f"{most} seeds" if least == most else f"{least} to {most} seeds"
    contrast = yaml.safe_load((ROOT / "jobs" / "galrec.yaml").read_text())["model"]["contrast"]
    weights = ", ".join(f"λ{n} = {contrast[f'l{n}']}" for n in (1, 2, 3))
    figure.suptitle(f"GAL-Rec on Amazon Beauty, five epochs, {weights}: mean ± standard deviation over {over}")
    figure.savefig(FIGURES / "galrec_effects.png", dpi=130)
    print(FIGURES / "galrec_effects.png")


def write(name: str, content: dict[str, Any]) -> None:
    (RESULTS / name).write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
