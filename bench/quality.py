"""Quality on real data: every variant × seed of a suite, one JSON file each, and docs/RESULTS.md made from them.

    RAYGREC_DATA=… python -m bench.quality run beauty --seeds 0 1 2 --threads 2
    python -m bench.quality report

`run` skips what has a file already, so it can be cut off and started again.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from raygrec.train.folder import RunFolder

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
WORK = Path(os.environ.get("RAYGREC_WORK", ROOT / "runs" / "quality"))

STORES = {
    "beauty": ("sequences", "amazon_beauty", []),
    "toys": ("sequences", "amazon_toys", []),
    "ml-100k": ("movielens", "ml-100k", ["k_core=0", "split=ratio"]),
    "ml-100k-time": ("movielens", "ml-100k", ["k_core=0", "split=global-time"]),
}


@dataclass(frozen=True)
class Cell:
    """One method or variant: a job, and how it differs from it."""

    kind: Literal["method", "ours", "baseline", "ablation", "trap", "effect"]
    job: str | None
    """None: one of `bench.closed`, which trains nothing."""
    settings: tuple[str, ...] = ()
    shares: bool = False
    """GLTA: differs in nothing that the early stages read, and goes on from where prompts become whole."""


@dataclass(frozen=True)
class Suite:
    """What is compared on one data set. The one cell of kind `method` is the paper's as we read it, which ablations
    and traps differ from; `ours` departs from it; an `effect` has another value of one key."""

    title: str
    store: str
    cells: dict[str, Cell]
    decodings: tuple[str, ...] = ()
    note: str = ""
    spared: str = ""
    """What spares the method the traps."""
    shipped: str = ""
    """The cell of kind `ours` that the others are set against, seeds in pairs."""
    effects: dict[str, dict[float, str]] = field(default_factory=dict)
    """The values of a key whose effect is drawn, and the cells that have them."""

    @property
    def method(self) -> str:
        return next(name for name, cell in self.cells.items() if cell.kind == "method")


def glta(title: str, store: str, job: str, baselines: dict[str, Cell] | None = None, note: str = "") -> Suite:
    def ablation(*settings: str, shares: bool = True) -> Cell:
        return Cell("ablation", job, settings, shares)

    # Trap: node embeddings know the training targets. How users' and items' vectors are made, and what that does.
    cells = {
        **(baselines or {}),
        "GLTA": Cell("method", job),
        "GLTA, tied head": Cell("ours", job, ("model.head=tied",)),
        "GLTA without item alignment": ablation("model.item_alignment=false", shares=False),
        "GLTA without user alignment": ablation("model.user_token=id"),
        "GLTA without profile": ablation("model.texts.profile=false"),
        "GLTA without prediction": ablation("model.texts.prediction=false"),
        "GLTA without both texts": ablation("model.texts.profile=false", "model.texts.prediction=false"),
        "full user vector": Cell("trap", job, ("model.user_vector=full",), True),
        "full user vector, half dropped out": Cell(
            "trap", job, ("model.user_vector=full", "model.user_dropout=0.5"), True
        ),
        "item nodes from four folds": Cell("trap", job, ("graph.folds=4",)),
    }
    return Suite(title, store, cells, ("slots", "autoregressive"), note, "user vector left out")


# What `galrec-shared.yaml` has beside the prompts and the language model that reads them.
SHARED = ("text_tuning={updates: 100, precision: bf16}", "model.successors={alike: 10}")


def galrec(title: str, store: str, published: str) -> Suite:
    def baseline(job: str) -> Cell:
        return Cell("baseline", job)

    cells = {
        "Two-hop paths alone": Cell("baseline", None),
        "Successors alone": Cell("baseline", None),
        "LightGCN, searched": baseline("lightgcn.yaml"),
        "RLMRec-Con": baseline("rlmrec.yaml"),
        "SASRec-CE": baseline("sasrec.yaml"),
        "SASRec-CE + text": baseline("sasrec-text.yaml"),
        "BSARec-like": baseline("bsarec.yaml"),
        "GAL-Rec": Cell("method", "galrec.yaml"),
        "GAL-Rec, texts alone": Cell("ours", "galrec-texts.yaml"),
        "GAL-Rec, texts and successors": Cell("ours", "galrec-successors.yaml"),
        "GAL-Rec, texts and shared successors": Cell("ours", "galrec-shared.yaml", ("text_tuning=null",)),
        "GAL-Rec, tuned texts and successors": Cell("ours", "galrec-shared.yaml", ("model.successors.alike=0",)),
        "GAL-Rec, tuned texts and shared successors": Cell("ours", "galrec-shared.yaml"),
        "SASRec-CE + text + successors": Cell("baseline", "sasrec-text.yaml", ("model.successors={}",)),
        "SASRec-CE + text + shared successors": Cell("baseline", "sasrec-text.yaml", SHARED[1:]),
        "SASRec-CE + tuned text + shared successors": Cell("ours", "sasrec-text.yaml", SHARED),
    }
    note = (
        f"Published under the same protocol, N@10: {published}; compare with those, too, since our BSARec-like, with "
        "a causal filter, stays below what its paper says. `texts alone` has neither node vectors nor contrast. "
        "`successors`: what other users took next, added to the logits (with 12 epochs; without, 10). `tuned texts`: "
        "read by a language model that was tuned on which items follow one another. `shared`: successors passed on "
        "among items of like texts. SASRec with texts and successors trains no language model: it tells what ours has "
        "of that; SASRec with tuned texts and shared successors is ours but for the language model that reads the "
        "prompts."
    )
    return Suite(title, store, cells, note=note, shipped="GAL-Rec, tuned texts and shared successors")


def galrec_parts(title: str, store: str) -> Suite:
    def cell(kind: Literal["method", "ours", "ablation", "effect", "trap"], *settings: str) -> Cell:
        return Cell(kind, "galrec.yaml", ("train.epochs=5", *settings))

    one_hop = "[{side: user, anchor: 1, weight: l2}, {side: item, anchor: 1, weight: l3}]"
    from_two = ", ".join(
        f"{{side: {side}, anchor: 2, positive: {hop}, weight: {weight}}}"
        for side, hop, weight in (("user", 0, "l1"), ("user", 1, "l2"), ("item", 0, "l3"), ("item", 1, "l3"))
    )

    cells = {
        "GAL-Rec": cell("method"),
        "GAL-Rec, read at hop 1": cell("ours", "model.readout=hop1"),
        "GAL-Rec, read at hop 2": cell("ours", "model.readout=hop2"),
        "GAL-Rec, two hops as anchors": cell("ours", f"model.contrast.pairs=[{from_two}]"),
        "GAL-Rec without L1": cell("ablation", "model.contrast.l1=0"),
        "GAL-Rec without L2": cell("ablation", "model.contrast.l2=0"),
        "GAL-Rec without L3": cell("ablation", "model.contrast.l3=0"),
        "GAL-Rec without L1, L2, L3": cell("ablation", *(f"model.contrast.l{n}=0" for n in (1, 2, 3))),
        "GAL-Rec without queue": cell("ablation", "model.contrast.queue=0"),
        "GAL-Rec without momentum encoder": cell("ablation", "model.contrast.momentum=null"),
        "GAL-Rec without hop 0 in the contrast": cell("ablation", f"model.contrast.pairs={one_hop}"),
        "GAL-Rec without items' one-hop neighbours": cell("ablation", "model.neighbours.one_hop=0"),
        "GAL-Rec without two-hop neighbours": cell("ablation", "model.neighbours.two_hop=0"),
        "GAL-Rec without text vectors": cell("ablation", "model.text_vectors=false"),
        "GAL-Rec without graph vectors": cell("ablation", "model.graph_vectors=false"),
        "GAL-Rec without tuning of the LM": cell("ablation", "model.tuning=frozen"),
        "GAL-Rec without pretraining of the LM": cell("ablation", "backbone.pretrained=false"),
        "GAL-Rec, nodes fitted on all edges": cell("trap", "graph.folds=0"),
    }
    effects = {
        "model.contrast.temperature": {0.1: "GAL-Rec"},
        "model.contrast.queue": {0: "GAL-Rec without queue", 1024: "GAL-Rec"},
        "model.neighbours.one_hop": {0: "GAL-Rec without items' one-hop neighbours", 8: "GAL-Rec"},
        "model.neighbours.two_hop": {0: "GAL-Rec without two-hop neighbours", 4: "GAL-Rec"},
    }
    others = {
        "model.contrast.temperature": (0.05, 0.2, 0.5, 1.0),
        "model.contrast.queue": (256, 4096),
        "model.neighbours.one_hop": (2, 16),
        "model.neighbours.two_hop": (1, 8),
    }
    for key, values in others.items():
        for value in values:
            name = f"GAL-Rec, {key}={value}"
            cells[name], effects[key][value] = cell("effect", f"{key}={value}"), name
    note = (
        "Half the epochs of the job, for the method and for what it is without. The job recommends at the newest "
        "history item, which sees the history alone: hops act through what the contrast teaches the language model. "
        "Without its pretraining prompts are read by a random one; text vectors stay those of the pretrained one."
    )
    return Suite(title, store, cells, note=note, spared="five folds", effects=effects)


BSAREC, GRAM = "[BSARec](https://arxiv.org/abs/2312.10325)", "[GRAM](https://arxiv.org/abs/2506.01673)"
EASE = {"EASE": Cell("baseline", None)}
SUITES = {
    "beauty": glta("GLTA on Amazon Beauty, leave-one-out", "beauty", "glta.yaml"),
    "ml-100k": glta("GLTA on MovieLens-100K, per-user 80/20 random", "ml-100k", "glta-ml100k.yaml", EASE),
    "ml-100k-time": glta(
        "GLTA on MovieLens-100K, global time",
        "ml-100k-time",
        "glta-ml100k-time.yaml",
        {**EASE, "GLTA without trend": Cell("ablation", "glta-ml100k-time.yaml", ("model.trend=null",), True)},
        "Most users of the test set have no history: of them LightGCN knows nothing, and popularity ranks, that in all "
        "training interactions or the recent one, which GLTA's trend reads.",
    ),
    "galrec-beauty": galrec("GAL-Rec on Amazon Beauty, leave-one-out", "beauty", f"{BSAREC} .0610, {GRAM} .0531"),
    "galrec-parts": galrec_parts("What each part of GAL-Rec does, on Amazon Beauty, five epochs", "beauty"),
    "galrec-toys": galrec("GAL-Rec on Amazon Toys, leave-one-out", "toys", f"{BSAREC} .0663, {GRAM} .0603"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make what is missing")
    run.add_argument("suite", choices=SUITES)
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    run.add_argument("--cells", nargs="+", help="by default all but traps and effects")
    run.add_argument("--decodings", nargs="*", help="besides `first`; by default all")
    run.add_argument("--threads", type=int, default=2)
    commands.add_parser("report", help="write docs/RESULTS.md")
    arguments = parser.parse_args()
    if arguments.command == "report":
        from bench.report import write_report

        write_report(RESULTS, ROOT / "docs" / "RESULTS.md", SUITES)
        return
    suite = SUITES[arguments.suite]
    names = arguments.cells or [name for name, cell in suite.cells.items() if cell.kind not in ("trap", "effect")]
    unknown = set(names) - set(suite.cells)
    if unknown:
        parser.error(f"cell '{min(unknown)}': expected one of {', '.join(suite.cells)}")
    decodings = suite.decodings if arguments.decodings is None else arguments.decodings
    if unknown := set(decodings) - set(suite.decodings):
        parser.error(f"decoding '{min(unknown)}': expected one of {', '.join(suite.decodings) or '(none)'}")
    for seed in arguments.seeds:
        for name in names:
            one(arguments.suite, name, seed, arguments.threads, decodings)


def result_file(suite: str, name: str, seed: int) -> Path:
    return RESULTS / suite / f"{re.sub('[^A-Za-z0-9]+', '-', name)}-s{seed}.json"


def one(suite_name: str, name: str, seed: int, threads: int, decodings: Sequence[str]) -> None:
    """Trains one cell in a process of its own, ranks with other decodings where asked, and writes its file."""
    suite = SUITES[suite_name]
    cell, file = suite.cells[name], result_file(suite_name, name, seed)
    known = json.loads(file.read_text()) if file.exists() else None
    wanted = decodings if cell.kind == "method" else []
    if known and all(mode in known["metrics"].get("decodings", {}) for mode in wanted):
        return
    out = WORK / suite_name / file.stem
    if cell.job is None:
        write_closed(suite_name, name, seed, file)
        return
    settings = [f"store={prepare(suite.store)}", f"out={out}", f"seed={seed}", *cell.settings]
    if cell.shares and not out.exists():
        donor = WORK / suite_name / result_file(suite_name, suite.method, seed).stem
        start_after_early_stages(donor, out, cell.job, settings)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    started = time.time()
    resumed = ["--resume"] if out.exists() else []
    call(raygrec("train", f"jobs/{cell.job}", *settings, "--local", *resumed), environment)
    seconds = None if resumed else time.time() - started  # of a part they would mislead
    metrics = json.loads((out / "metrics.json").read_text())
    metrics["decodings"] = known["metrics"].get("decodings", {}) if known else {}
    for mode in wanted:
        if mode not in metrics["decodings"]:
            found = call(raygrec("evaluate", out, "--decoding", mode, "--json"), environment)
            metrics["decodings"][mode] = json.loads(found)
    history = RunFolder(out).history()
    shown = [f"store=stores/{suite.store}", f"out=runs/{file.stem}", f"seed={seed}", *cell.settings, "--local"]
    command = shlex.join(["raygrec", "train", f"jobs/{cell.job}", *shown])
    seconds = known["seconds"] if known else seconds
    write_result(file, suite_name, name, seed, command=command, metrics=metrics, history=history, seconds=seconds)


def write_closed(suite: str, name: str, seed: int, file: Path) -> None:
    from bench.closed import METHODS

    command = shlex.join(["python", "-m", "bench.quality", "run", suite, "--cells", name])
    write_result(file, suite, name, seed, command=command, metrics=METHODS[name](prepare(SUITES[suite].store), seed))


def write_result(file: Path, suite: str, name: str, seed: int, **found: Any) -> None:
    """A cell's file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".draft")
    told = {"suite": suite, "variant": name, "seed": seed, **found, "machine": machine()}
    draft.write_text(json.dumps(told, indent=1) + "\n")
    draft.replace(file)


def start_after_early_stages(donor: Path, out: Path, job_file: str, settings: list[str]) -> None:
    """Makes the run folder `out` with what `donor` trained before stage 3 read whole prompts, if it has done so.

    A run from the start would train the very same: the stages are functions of seed, data and what they read.
    """
    from raygrec.config import apply_overrides, read_yaml
    from raygrec.train.folder import with_absolute_paths
    from raygrec.train.settings import run_config

    source, folder = RunFolder(donor), RunFolder(out)
    if not source.model_file.exists():
        return
    content = apply_overrides(read_yaml(ROOT / "jobs" / job_file), settings)
    folder.start(with_absolute_paths(run_config(content, job_file)), resume=False)
    shutil.copy(source.nodes_file, folder.nodes_file)
    for stage in ("alignment", "histories"):
        if source.parts_file(stage).exists():
            shutil.copy(source.parts_file(stage), folder.parts_file(stage))
    for record in source.history():
        if record["stage"] != "train":
            folder.report(record)


def prepare(name: str) -> Path:
    """The store of that name, made from RAYGREC_DATA where it is not there yet."""
    store = WORK / "stores" / name
    if not store.exists():
        layout, folder, options = STORES[name]
        source = Path(os.environ["RAYGREC_DATA"]) / folder
        call(raygrec("prepare", layout, source, "--out", store, *options), dict(os.environ))
    return store


def demo_store() -> Path:
    """The store that `raygrec demo` makes."""
    from raygrec.config import validate
    from raygrec.data.options import PrepareOptions
    from raygrec.data.prepare import prepare as make_store
    from raygrec.data.synthetic import write_demo

    store = WORK / "stores" / "demo"
    if not store.exists():
        source = write_demo(WORK / "stores" / "demo-source", 1500, 800)
        make_store(validate(PrepareOptions, {"format": "table", "path": source, "out": store}, "demo"))
    return store


def raygrec(*arguments: str | Path) -> list[str]:
    """The command line of `raygrec` in this environment."""
    return [sys.executable, "-m", "raygrec.cli", *map(str, arguments)]


def call(command: list[str], environment: dict[str, str]) -> str:
    """Runs a command; returns the last line of its output."""
    done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1] if done.stdout else ""


def machine(*libraries: str) -> dict[str, Any]:
    """Processor and versions, of torch, transformers and `libraries`."""
    import torch

    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "processor": f"{os.cpu_count()} cores, {_processor()}, {accelerator}",
        "versions": {name: version(name) for name in ("torch", "transformers", *libraries)},
    }


def _processor() -> str:
    known = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", known.read_text()) if known.exists() else None
    return f"{named[1].strip()} ({platform.machine()})" if named else platform.machine()


if __name__ == "__main__":
    main()
