"""Row 2: `raygrec prepare table`, against a pandas script with the same filters, ids, splits and texts."""

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
from bench.speed.measure import compared, in_turns, status, write

SIZES = {1_000_000: 3, 10_000_000: 1}  # interactions: rounds
FOLDER = WORK / "prepare"
WORDS = ("red", "blue", "green", "small", "large", "soft", "round", "classic", "travel", "kitchen", "garden", "winter")


def main() -> None:
    cases: list[dict[str, Any]] = []
    for size, rounds in SIZES.items():
        cases.append(case(size, rounds))
        told(cases)  # a row that is cut off has what it had


def told(cases: list[dict[str, Any]]) -> None:
    largest = cases[-1]["peak_mib"]["raygrec"][""]
    fast = min(one["ratio"]["median"] for one in cases) >= 3
    write(
        "prepare",
        {
            "row": 2,
            "title": "From interactions.csv and items.csv to filtered, numbered, split arrays and texts",
            "against": "a pandas script (`bench/speed/pandas_prepare.py`), as processes",
            "target": "≥ 3×, peak memory under 2 GB at 10 M",
            "reached": fast and len(cases) == len(SIZES) and largest * 2**20 < 2e9,
            "cases": cases,
        },
        "pandas",
        "pyarrow",
    )


def case(size: int, rounds: int) -> dict[str, Any]:
    source = written(size)
    out = {side: FOLDER / f"{side}-{size}" for side in ("raygrec", "pandas")}
    commands = {
        "raygrec": [*raygrec("prepare", "table", source, "--out", out["raygrec"], "--json")],
        "pandas": [sys.executable, str(ROOT / "bench/speed/pandas_prepare.py"), str(source), str(out["pandas"])],
    }
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
    if facts["raygrec"] != facts["pandas"]:
        raise SystemExit(f"the two do not make the same data: {facts}")
    read = sum(file.stat().st_size for file in source.iterdir())
    return compared(
        f"{size:,} interactions",
        seconds,
        *commands,
        moved=2 * read,  # read once, and for the manifest's checksum once more
        peak_mib={side: {"": peak} for side, peak in peaks.items()},
        facts=facts["raygrec"],
    )


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
    draft.mkdir(parents=True, exist_ok=True)
    table = {
        "user": pd.Series(drawn.integers(users, size=size)).map("A{:012d}".format),
        "item": pd.Series((items * drawn.random(size) ** 2).astype(np.int64)).map("B{:09d}".format),
        "time": drawn.integers(1_300_000_000, 1_700_000_000, size),
    }
    pd.DataFrame(table).to_csv(draft / "interactions.csv", index=False)
    words = np.array(WORDS)[drawn.integers(len(WORDS), size=(items, 6))]
    text = {
        "item": [f"B{number:09d}" for number in range(items)],
        "title": [" ".join(row[:4]) + f" {number}" for number, row in enumerate(words)],
        "categories": ["|".join(row[4:]) for row in words],
    }
    pd.DataFrame(text).to_csv(draft / "items.csv", index=False)
    draft.rename(folder)
    return folder
