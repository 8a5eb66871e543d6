"""What sweeps save and find: on the demo's data with GAL-Rec and two DeepSpeed workers a trial, and on Amazon Beauty.

python -m bench.sweep asha      # 12 trials pruned by ASHA, killed half-way and resumed, against the same 12 to the end
python -m bench.sweep cost      # a sweep of 6 trials from raw data, against 6 times prepare and train
python -m bench.sweep search METHOD [key=value …]   # its space on Amazon Beauty, 12 trials; begun again, it goes on
"""

import argparse
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pandas as pd

from bench.quality import RESULTS, ROOT, WORK, machine, prepare, raygrec
from raygrec.cluster.space import first_points, points, read_sweep
from raygrec.cluster.sweep_folder import SweepFolder
from raygrec.data.synthetic import write_demo
from raygrec.evaluate.sweeps import best_trial
from raygrec.evaluate.sweeps import read_sweep as read_tables
from raygrec.train.folder import RunFolder

SPACE = "tune_spaces/smoke.yaml"
SPACES = {  # searched with the same number of trials
    "galrec": ("tune_spaces/galrec.yaml", "jobs/galrec.yaml"),
    "galrec-successors": ("tune_spaces/galrec-successors.yaml", "jobs/galrec-successors.yaml"),
    "sasrec": ("tune_spaces/sasrec.yaml", "jobs/sasrec.yaml"),
    "sasrec-text": ("tune_spaces/sasrec.yaml", "jobs/sasrec-text.yaml"),
    "bsarec": ("tune_spaces/bsarec.yaml", "jobs/bsarec.yaml"),
    "rlmrec": ("tune_spaces/rlmrec.yaml", "jobs/rlmrec.yaml"),
    "lightgcn": ("tune_spaces/lightgcn.yaml", "jobs/lightgcn.yaml"),
}
SETTINGS = ["backbone.layers=1", "train.epochs=6"]
FOLDER = WORK / "sweep"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["asha", "cost", "search"])
    parser.add_argument("method", nargs="?", choices=SPACES, help="search: whose space")
    parser.add_argument("settings", nargs="*", help="search: settings of the job that the space does not have")
    given = parser.parse_args()
    what = given.what
    name = what
    if what == "search":
        if given.method is None:
            parser.error(f"search wants one of {', '.join(SPACES)}")
        name = f"search-{given.method}"
        result = search(given.method, FOLDER / name, given.settings)
    else:
        shutil.rmtree(FOLDER / what, ignore_errors=True)
        (FOLDER / what).mkdir(parents=True)
        if not (FOLDER / "source").exists():
            write_demo(FOLDER / "source")
        result = {"asha": asha, "cost": cost}[what](FOLDER / what)
    result["command"] = " ".join([f"python -m bench.sweep {name.replace('-', ' ', 1)}", *given.settings])
    told = json.dumps(result, indent=1, default=lambda value: value.item())  # of numpy
    print(told)
    file = RESULTS / "sweep" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(told + "\n")


def prepared(store: Path) -> Path:
    subprocess.run(raygrec("prepare", "table", FOLDER / "source", "--out", store), cwd=ROOT, check=True)
    return store


def sweep(out: Path, store: Path, trials: int, *more: str) -> list[str]:
    return raygrec("tune", SPACE, f"out={out}", f"store={store}", f"trials={trials}", *SETTINGS, *more)


def asha(folder: Path) -> dict[str, Any]:
    """Trial-epochs and best validation metric, pruned and not; the pruned sweep loses its driver on the way."""
    store, trials = prepared(folder / "store"), 12
    pruned = folder / "pruned"
    process = subprocess.Popen(sweep(pruned, store, trials), cwd=ROOT)
    while process.poll() is None and ended(pruned) < trials // 2:
        time.sleep(1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = ended(pruned)
    done = subprocess.run(
        [*sweep(pruned, store, trials), "--resume", "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    resumed = json.loads(done.stdout.splitlines()[-1])
    subprocess.run(sweep(folder / "whole", store, trials, "scheduler.name=none"), cwd=ROOT, check=True)
    tables = {name: pd.read_parquet(folder / name / "trials.parquet") for name in ("pruned", "whole")}
    return {
        "trials": trials,
        "ended_before_kill": before,
        "statuses": tables["pruned"]["status"].value_counts().to_dict(),
        "left_groups": resumed["left_groups"],
        "epochs": {name: float(table["epochs"].sum()) for name, table in tables.items()},
        "best": {name: float(table["score"].max()) for name, table in tables.items()},
        "seconds": {name: float(table["seconds"].sum()) for name, table in tables.items()},
    }


def ended(out: Path) -> int:
    files = out.glob("trials/*/outcome.json")
    return sum(json.loads(file.read_text())["status"] != "running" for file in files)


def cost(folder: Path) -> dict[str, Any]:
    """Seconds from raw data: one sweep, and each of its points by itself."""
    trials = 6
    begun = time.monotonic()
    subprocess.run(sweep(folder / "sweep", prepared(folder / "store"), trials), cwd=ROOT, check=True)
    swept = time.monotonic() - begun
    read = read_sweep(ROOT / SPACE, [f"trials={trials}", *SETTINGS])
    begun, epochs = time.monotonic(), []
    for number, point in enumerate(points(read) or []):
        store = prepared(folder / f"store-{number}")
        given = {**read.settings, **point, "store": store, "out": folder / f"run-{number}"}
        settings = [f"{key}={value}" for key, value in given.items()]
        subprocess.run(raygrec("train", read.job, *settings), cwd=ROOT, check=True)
        epochs.append(RunFolder(given["out"]).history()[-1]["epoch"])
    apart = time.monotonic() - begun
    table = pd.read_parquet(folder / "sweep" / "trials.parquet")
    return {
        "trials": trials,
        "sweep_seconds": swept,
        "apart_seconds": apart,
        "ratio": swept / apart,
        "epochs": {"sweep": float(table["epochs"].sum()), "apart": sum(epochs)},
        "statuses": table["status"].value_counts().to_dict(),
    }


def search(method: str, folder: Path, job_settings: list[str]) -> dict[str, Any]:
    """What a search on Beauty finds by validation, and the figure of every key's effect."""
    (space, job_file), store, trials = SPACES[method], prepare("beauty"), 12
    settings = [f"job={job_file}", f"trials={trials}", "searcher.startup=6", "seed=1", *job_settings]
    settings += ["concurrency=2", "cluster.workers=1", "engine.zero_stage=0"]  # one worker has none to share with
    resumed = ["--resume"] if folder.exists() else []
    subprocess.run(raygrec("tune", space, f"out={folder}", f"store={store}", *settings, *resumed), cwd=ROOT, check=True)
    table = pd.read_parquet(folder / "trials.parquet")
    figure = ROOT / "docs" / "figures" / f"search-{method}.png"
    shutil.copy(folder / "figures" / "effects.png", figure)
    best, job = best_trial(table, "max"), trial_of_job(table, folder)
    drawn = read_tables(folder, "ndcg@10", "max")
    early = dict(zip(drawn.trials["trial"], drawn.comparable, strict=True))
    return {
        "space": space,
        "settings": job_settings,
        "trials": trials,
        "statuses": table["status"].value_counts().to_dict(),
        "epochs": float(table["epochs"].sum()),
        "shared_epoch": drawn.shared_epoch,
        "job": {
            "file": job_file,
            "score": float(job["score"]),
            "early": early[job["trial"]],
            "epochs": float(job["epochs"]),
            "status": job["status"],
        },
        "best": {
            "early": early[best["trial"]],
            "score": float(best["score"]),
            "point": {key: best[f"config.{key}"] for key in read_sweep(ROOT / space, []).space},
        },
        "figure": figure.name,
        "machine": machine(),
    }


def trial_of_job(table: pd.DataFrame, folder: Path) -> pd.Series:
    """The row of the job as it stands, the first of `searcher.first`."""
    found = SweepFolder(folder)
    name = found.trial(first_points(found.config())[0]).path.name
    return table[table["trial"] == name].iloc[0]


if __name__ == "__main__":
    main()
