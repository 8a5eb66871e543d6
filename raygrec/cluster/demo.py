"""The demo: a small data set of our own through the whole house, on two workers of this machine."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from raygrec.cluster.launcher import train_on_ray
from raygrec.config import validate
from raygrec.data.options import PrepareOptions
from raygrec.data.prepare import prepare
from raygrec.data.synthetic import write_demo
from raygrec.errors import InputError
from raygrec.evaluate.tables import Row, terminal_table
from raygrec.model.backbone import load_tokenizer
from raygrec.serve.topk import FinishedRun
from raygrec.train.settings import GALRecRun, GLTARun

# Small enough for two CPU cores and a few minutes; everything else is the defaults.
SETTINGS: dict[str, Any] = {
    "backbone": {"name": "minilm", "layers": 2},
    "graph": {"dim": 64, "layers": 3, "batch_size": 1024, "epochs": 40, "evaluate_every": 5},
    "model": {"max_history": 20},
    "alignment": {"epochs": 3, "batch": 16, "micro_batch": 8, "lr": 0.0005},
    "histories": {"epochs": 6, "batch": 64, "micro_batch": 32, "lr": 0.002},
    "train": {"epochs": 4, "batch": 64, "micro_batch": 32, "lr": 0.001},
    "engine": {"zero_stage": 2},
    "cluster": {"workers": 2},
}
GALREC: dict[str, Any] = {
    "model": {"max_history": 20, "contrast": {"momentum": 0.99}},
    "train": {"epochs": 6, "batch": 64, "micro_batch": 32, "lr": 0.001},
}
SHARED = ("backbone", "graph", "engine", "cluster")  # sections that both runs read
SHOWN_USERS = 3


def run_demo(
    out: Path,
    users: int = 1500,
    items: int = 800,
    settings: dict[str, Any] | None = None,
    galrec: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Makes, prepares, trains, evaluates and shows; returns what it showed.

    settings: sections that replace those of `SETTINGS`; galrec: those of `GALREC`. Raises `InputError` where `out`
    exists.
    """
    if out.exists():
        raise InputError(f"{out}: exists already; remove it or name another folder with --out")
    settings = {**SETTINGS, **(settings or {})}
    load_tokenizer(settings["backbone"]["name"])  # where there is no such backbone, nothing is made
    console = Console()
    source = write_demo(out / "source", users, items)
    store = prepare(validate(PrepareOptions, {"format": "table", "path": source, "out": out / "store"}, "demo"))
    train, valid, test = (len(store.interactions(split).indices) for split in ("train", "valid", "test"))
    console.print(
        f"A made-up bookshop: {store.num_users:,} readers, {store.num_items:,} books, "
        f"{train:,} training, {valid:,} validation and {test:,} test interactions"
    )
    run = out / "run"
    config = validate(GLTARun, {"store": store.path, "out": run, **settings}, "demo")
    metrics = train_on_ray(config)
    rows = [Row(name, [both["test"]]) for name, both in metrics["baselines"].items()]
    rows.append(Row("GLTA", [metrics["test"]]))
    tuned = {**{name: settings[name] for name in SHARED}, **GALREC, **(galrec or {})}
    config = validate(GALRecRun, {"store": store.path, "out": out / "run-galrec", **tuned}, "demo")
    galrec_metrics = train_on_ray(config)
    rows.append(Row("GAL-Rec", [galrec_metrics["test"]]))
    console.print()
    console.print(terminal_table(rows, title="last book of each reader, full ranking, seed 0"))
    examples = _examples(FinishedRun(run))
    for example in examples:
        _show(console, example)
    console.print(f"\nrun folder: {run}   (raygrec evaluate {run} · raygrec recommend {run} --k 10)", soft_wrap=True)
    return {
        "run": str(run),
        "test": metrics["test"],
        "galrec": {"run": str(config.out), "test": galrec_metrics["test"]},
        "baselines": metrics["baselines"],
        "examples": examples,
    }


def _examples(finished: FinishedRun) -> list[dict[str, Any]]:
    """History, recommendations and the true next item of a few users spread over the store."""
    store = finished.store
    users = np.linspace(0, store.num_users - 1, SHOWN_USERS + 2).astype(np.int64)[1:-1]
    items, _ = finished.top(users, 5)
    test = store.interactions("test")
    return [
        {
            "user": store.user_ids[int(user)],
            "history": finished.history(int(user))[-5:],
            "top": [store.titles[item] for item in items[row].tolist()],
            "next": [store.titles[int(item)] for item in test[int(user)]],
        }
        for row, user in enumerate(users)
    ]


def _show(console: Console, example: dict[str, Any]) -> None:
    console.print(f"\nreader {example['user']}", style="bold", highlight=False)
    width = min(46, (console.width - 8) // 2)
    left = ["read before (newest last)", *example["history"]]
    right = ["recommended", *example["top"]]
    for line in range(max(len(left), len(right))):
        first, second = (column[line] if line < len(column) else "" for column in (left, right))
        mark = "✓" if line and second in example["next"] else " "
        text = Text(f"  {_cut(first, width)} {mark} {_cut(second, width)}")
        console.print(text, style="dim" if line == 0 else "", highlight=False)


def _cut(title: str, width: int) -> str:
    short = title if len(title) <= width else title[: width - 1] + "…"
    return short.ljust(width)
