"""Row 2: `raygrec prepare table`, against a pandas script with the same filters, ids, splits and texts, and RecBole.

RecBole is compared where RECBOLE_PYTHON names an interpreter that has it (1.2.1 runs with "numpy<2", "pandas<2.3",
"scipy<1.11" and "setuptools<81" on Python 3.11).
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.quality import ROOT, WORK, raygrec
from bench.speed.measure import Seconds, compared, in_turns, status, write

SIZES = {1_000_000: 3, 10_000_000: 1}  # interactions: rounds
ALONE = 50_000_000  # interactions that raygrec reads without the others
RECBOLE = "RECBOLE_PYTHON"
RECBOLE_MOST = 1_000_000  # interactions: what it takes grows with them, and it takes long
PART = 1_000_000  # interactions that are written at once
FOLDER = WORK / "prepare"
WORDS = ("red", "blue", "green", "small", "large", "soft", "round", "classic", "travel", "kitchen", "garden", "winter")


def main() -> None:
    found: list[dict[str, Any]] = []
    for size, rounds in SIZES.items():
        found += cases(size, rounds)
        told(found)  # a row that is cut off has what it had
    found[-1]["note"] = alone(ALONE)
    if RECBOLE not in os.environ:
        found[0]["note"] = f"RecBole is left out, {RECBOLE} names no interpreter that has it"
    told(found)


def told(found: list[dict[str, Any]]) -> None:
    largest = found[-1]["peak_mib"]["raygrec"][""]
    fast = min(one["ratio"]["median"] for one in found) >= 3
    whole = f"{max(SIZES):,}" in found[-1]["case"] and any("RecBole" in one["case"] for one in found)
    write(
        "prepare",
        {
            "row": 2,
            "title": "From interactions.csv and items.csv to filtered, numbered, split arrays and texts",
            "against": "a pandas script (`bench/speed/pandas_prepare.py`) and RecBole's data set and loaders, which it "
            "does not write (`bench/speed/recbole_prepare.py`), as processes",
            "target": "≥ 3×, peak memory under 2 GB at 10 M",
            "reached": fast and whole and largest * 2**20 < 2e9,
            "cases": found,
        },
        "pandas",
        "pyarrow",
    )


def cases(size: int, rounds: int) -> list[dict[str, Any]]:
    """raygrec against each of the others, all in the same turns."""
    source = written(size)
    out = {side: FOLDER / f"{side}-{size}" for side in ("raygrec", "pandas")}
    commands = {
        "raygrec": [*raygrec("prepare", "table", source, "--out", out["raygrec"], "--json")],
        "pandas": [sys.executable, str(ROOT / "bench/speed/pandas_prepare.py"), str(source), str(out["pandas"])],
    }
    if RECBOLE in os.environ and size <= RECBOLE_MOST:
        script = ROOT / "bench/speed/recbole_prepare.py"
        commands["RecBole"] = [os.environ[RECBOLE], "-W", "ignore", str(script), str(atomic(source))]
    facts: dict[str, dict[str, int]] = {}
    peaks: dict[str, float] = {}

    def run(side: str) -> float:
        found, peaks[side], seconds = process(commands[side])
        facts[side] = {key: found[key] for key in ("users", "items", "train", "valid", "test")}
        return seconds

    def clean(_: int) -> None:
        for place in out.values():
            shutil.rmtree(place, ignore_errors=True)

    seconds = in_turns({side: lambda _, side=side: run(side) for side in commands}, rounds, warm=0, before=clean)
    clean(0)
    if any(found != facts["raygrec"] for found in facts.values()):
        raise SystemExit(f"they do not make the same data: {facts}")
    others = [side for side in commands if side != "raygrec"]
    return [case(f"{size:,} interactions, {side}", seconds, side, source, peaks, facts["raygrec"]) for side in others]


def case(
    name: str, seconds: Seconds, other: str, source: Path, peaks: dict[str, float], facts: dict[str, int]
) -> dict[str, Any]:
    return compared(
        name,
        seconds,
        "raygrec",
        other,
        moved=2 * _bytes(source),  # read once, and for the manifest's checksum once more
        peak_mib={side: {"": peaks[side]} for side in ("raygrec", other)},
        facts=facts,
    )


def alone(size: int) -> str:
    out = FOLDER / f"raygrec-{size}"
    try:
        _, peak, seconds = process([*raygrec("prepare", "table", written(size), "--out", out, "--json")])
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return f"raygrec alone reads {size:,} interactions in {seconds:,.0f} s, with {peak:,.0f} MiB of memory"


def process(command: list[str]) -> tuple[dict[str, Any], float, float]:
    """The JSON of its last line, its peak memory in MiB, and its seconds of CPU time."""
    environment = os.environ | {"RAYGREC_QUIET": "1"}
    with (
        tempfile.TemporaryFile("w+") as output,
        subprocess.Popen(command, stdout=output, env=environment, cwd=ROOT) as running,
    ):
        # Not the peak that wait4 tells: it begins with that of the process which started this one.
        peak, ended = 0, 0
        while not ended:
            peak = max(peak, _peak_kib(running.pid))
            ended, status, used = os.wait4(running.pid, os.WNOHANG)
            time.sleep(0.02)
        running.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        lines = output.read().splitlines()
    if running.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {running.returncode}")
    return json.loads(lines[-1]), peak / 2**10, used.ru_utime + used.ru_stime


def _peak_kib(process: int) -> int:
    try:
        return status("VmHWM", process)
    except (OSError, StopIteration):  # it has just ended
        return 0


def written(size: int) -> Path:
    """A folder of two tables: a tenth as many users as interactions, a fortieth as many items, few of them popular."""
    folder = FOLDER / f"source-{size}"
    if folder.exists():
        return folder
    drawn = np.random.default_rng(0)
    users, items = size // 10, size // 40
    draft = folder.with_suffix(".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    table = {
        "user": drawn.integers(users, size=size),
        "item": (items * drawn.random(size) ** 2).astype(np.int64),
        "time": drawn.integers(1_300_000_000, 1_700_000_000, size),
    }
    for start in range(0, size, PART):
        part = pd.DataFrame({name: column[start : start + PART] for name, column in table.items()})
        part["user"], part["item"] = part["user"].map("A{:012d}".format), part["item"].map("B{:09d}".format)
        part.to_csv(draft / "interactions.csv", index=False, header=not start, mode="a")
    words = np.array(WORDS)[drawn.integers(len(WORDS), size=(items, 6))]
    text = {
        "item": [f"B{number:09d}" for number in range(items)],
        "title": [" ".join(row[:4]) + f" {number}" for number, row in enumerate(words)],
        "categories": ["|".join(row[4:]) for row in words],
    }
    pd.DataFrame(text).to_csv(draft / "items.csv", index=False)
    draft.rename(folder)
    return folder


def atomic(source: Path) -> Path:
    """The same two tables as RecBole's atomic files, in a folder of their own beside them."""
    folder = source.with_name(f"recbole-{source.name}")
    if folder.exists():
        return folder
    draft = folder.with_suffix(".draft")
    draft.mkdir(parents=True, exist_ok=True)
    columns = {"user": "user_id:token", "item": "item_id:token", "time": "timestamp:float"}
    interactions = pd.read_csv(source / "interactions.csv").rename(columns=columns)
    interactions.to_csv(draft / f"{folder.name}.inter", sep="\t", index=False)
    items = pd.read_csv(source / "items.csv")
    items["categories"] = items["categories"].str.replace("|", " ")
    columns = {"item": "item_id:token", "title": "title:token_seq", "categories": "categories:token_seq"}
    items.rename(columns=columns).to_csv(draft / f"{folder.name}.item", sep="\t", index=False)
    draft.rename(folder)
    return folder


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
