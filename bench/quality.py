"""Quality on real data: every variant × seed of a suite, one JSON file each, and docs/RESULTS.md made from them.

    RAYGREC_DATA=… python -m bench.quality run beauty --seeds 0 1 2 --threads 2
    python -m bench.quality report

`run` skips what has a file already, so it can be cut off and started again.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
WORK = Path(os.environ.get("RAYGREC_WORK", ROOT / "runs" / "quality"))

STORES = {
    "beauty": ("sequences", "amazon_beauty", []),
    "ml-100k": ("movielens", "ml-100k", ["k_core=0", "split=ratio"]),
    "ml-100k-time": ("movielens", "ml-100k", ["k_core=0", "split=global-time"]),
}
TITLES = {
    "beauty": "Amazon Beauty, leave-one-out",
    "ml-100k": "MovieLens-100K, per-user 80/20 random",
    "ml-100k-time": "MovieLens-100K, global time",
}
VARIANTS: dict[str, list[str]] = {
    "GLTA": [],
    "without item alignment": ["model.item_alignment=false"],
    "without user alignment": ["model.user_token=id"],
    "without profile": ["model.texts.profile=false"],
    "without prediction": ["model.texts.prediction=false"],
    "without both texts": ["model.texts.profile=false", "model.texts.prediction=false"],
}
# Trap: node embeddings know the training targets. How the user vector is made, and what that does.
TRAPS: dict[str, list[str]] = {
    "full user vector": ["model.user_vector=full"],
    "full user vector, half dropped out": ["model.user_vector=full", "model.user_dropout=0.5"],
    "cross-fitted LightGCN": ["model.user_vector=cross_fit"],
}
SETTINGS = VARIANTS | TRAPS
# These differ from GLTA in nothing that its first stages read: they go on from where its prompts become whole.
SHARES_EARLY_STAGES = set(SETTINGS) - {"GLTA", "without item alignment", "cross-fitted LightGCN"}
DECODINGS = ("slots", "autoregressive")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make what is missing")
    run.add_argument("suite", choices=STORES)
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    run.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(SETTINGS))
    run.add_argument("--decodings", nargs="*", default=list(DECODINGS), choices=DECODINGS, help="besides `first`")
    run.add_argument("--threads", type=int, default=2)
    commands.add_parser("report", help="write docs/RESULTS.md")
    arguments = parser.parse_args()
    if arguments.command == "report":
        from bench.report import write_report

        write_report(RESULTS, ROOT / "docs" / "RESULTS.md", TITLES, list(VARIANTS), list(TRAPS))
        return
    for seed in arguments.seeds:
        for variant in arguments.variants:
            one(arguments.suite, variant, seed, arguments.threads, arguments.decodings)


def result_file(suite: str, variant: str, seed: int) -> Path:
    return RESULTS / suite / f"{variant.replace(' ', '-')}-s{seed}.json"


def one(suite: str, variant: str, seed: int, threads: int, decodings: list[str]) -> None:
    """Trains one cell in a process of its own, ranks with other decodings where asked, and writes its file."""
    file = result_file(suite, variant, seed)
    known = json.loads(file.read_text()) if file.exists() else None
    wanted = decodings if variant == "GLTA" else []
    if known and all(mode in known["metrics"].get("decodings", {}) for mode in wanted):
        return
    out = WORK / suite / file.stem
    settings = [f"store={prepare(suite)}", f"out={out}", f"seed={seed}", *SETTINGS[variant]]
    if variant in SHARES_EARLY_STAGES and not out.exists():
        start_after_early_stages(WORK / suite / result_file(suite, "GLTA", seed).stem, out, job(suite), settings)
    raygrec = [sys.executable, "-m", "raygrec.cli"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = ["train", f"jobs/{job(suite)}", *settings]
    started = time.time()
    call([*raygrec, *command, "--local", *(["--resume"] if out.exists() else [])], environment)
    seconds = time.time() - started
    metrics = json.loads((out / "metrics.json").read_text())
    metrics["decodings"] = known["metrics"].get("decodings", {}) if known else {}
    for mode in wanted:
        if mode not in metrics["decodings"]:
            found = call([*raygrec, "evaluate", str(out), "--decoding", mode, "--json"], environment)
            metrics["decodings"][mode] = json.loads(found)
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    shown = [f"store=stores/{suite}", f"out=runs/{suite}-s{seed}", f"seed={seed}", *SETTINGS[variant], "--local"]
    result = {
        "suite": suite,
        "variant": variant,
        "seed": seed,
        "command": " ".join(["raygrec train", f"jobs/{job(suite)}", *shown]),
        "metrics": metrics,
        "history": history,
        "seconds": known["seconds"] if known else seconds,
        "machine": machine(),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps(result, indent=1) + "\n")
    draft.replace(file)


def start_after_early_stages(donor: Path, out: Path, job_file: str, settings: list[str]) -> None:
    """Makes the run folder `out` with what `donor` trained before stage 3 read whole prompts, if it has done so.

    A run from the start would train the very same: the stages are functions of seed, data and what they read.
    """
    from raygrec.config import apply_overrides, read_yaml
    from raygrec.train.folder import RunFolder, with_absolute_paths
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


def job(suite: str) -> str:
    return "glta.yaml" if suite == "beauty" else "glta-ml100k.yaml"


def prepare(suite: str) -> Path:
    """The suite's store, made from RAYGREC_DATA where it is not there yet."""
    store = WORK / "stores" / suite
    if not store.exists():
        layout, folder, options = STORES[suite]
        source = Path(os.environ["RAYGREC_DATA"]) / folder
        command = ["prepare", layout, str(source), "--out", str(store), *options]
        call([sys.executable, "-m", "raygrec.cli", *command], dict(os.environ))
    return store


def call(command: list[str], environment: dict[str, str]) -> str:
    """Runs a command; returns the last line of its output."""
    done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1] if done.stdout else ""


def machine() -> dict[str, Any]:
    import torch
    import transformers

    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "processor": f"{os.cpu_count()} cores, {platform.machine()}, {accelerator}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


if __name__ == "__main__":
    main()
