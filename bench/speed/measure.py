"""The same work done in several ways, in turns, and what this machine would need for it at the least."""

import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.quality import RESULTS, machine

SPEED = RESULTS / "speed"
CPU, WALL = "CPU time", "wall clock"
MATMUL, COPY = "matmul", "copy"  # the machine's own rates, taken in the same turns
SIDE, BYTES = 768, 64 << 20
FLOPS = 2 * SIDE**3

Seconds = dict[str, list[float]]


def in_turns(
    sides: dict[str, Callable[[int], object]],
    rounds: int,
    warm: int = 1,
    before: Callable[[int], object] | None = None,
    clock: Callable[[], float] = time.process_time,
) -> Seconds:
    """Seconds of every side in every round, A B A B …, and those of a matrix product and a copy of known size.

    By default seconds of the process's own CPU time: what else runs on the machine adds nothing to them. A side is
    called with the round's number and may return its own seconds, where only a part of it counts. The first `warm`
    rounds are not counted; `before` makes a round's input.
    """
    factor = torch.ones(SIDE, SIDE)
    source, copied = torch.zeros(BYTES, dtype=torch.uint8), torch.zeros(BYTES, dtype=torch.uint8)
    rates = {MATMUL: lambda _: factor @ factor, COPY: lambda _: copied.copy_(source)}
    seconds: Seconds = {name: [] for name in (*sides, *rates)}
    for number in range(-warm, rounds):
        if before:
            before(number)
        for name, side in (sides | rates).items():
            started = clock()
            own = side(number)
            taken = own if isinstance(own, float) else clock() - started
            if number >= 0:
                seconds[name].append(taken)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
    return {"median": float(middle), "low": float(low), "high": float(high), "rounds": len(values)}


def compared(
    name: str,
    seconds: Seconds,
    ours: str,
    theirs: str,
    flops: float = 0,
    moved: float = 0,
    work: dict[str, float] | None = None,
    unit: str = "s",
    **more: Any,
) -> dict[str, Any]:
    """One line of a row: what both sides took, how many times as long theirs took, and the floor under ours.

    flops, moved: operations and bytes read or written that ours cannot do without, of all its work. work: how much of
    it (`unit`) each side did in a round, where that differs; rates are then told instead of seconds.
    """
    work = work or {ours: 1.0, theirs: 1.0}
    mine, other = (np.array(seconds[side]) / work[side] for side in (ours, theirs))
    found: dict[str, Any] = {"case": name, "unit": unit, "ratio": spread(other / mine)}
    for key, side, each in (("ours", ours, mine), ("theirs", theirs, other)):
        middle = float(np.median(each))
        found[key] = {"name": side, "value": middle if unit == "s" else 1 / middle}
    if flops or moved:
        by_flops = flops / (FLOPS / np.array(seconds[MATMUL]))
        by_bytes = moved / (2 * BYTES / np.array(seconds[COPY]))
        floor = np.maximum(by_flops, by_bytes)
        found["floor"] = {
            "flops": flops,
            "bytes": moved,
            "seconds": float(np.median(floor)),
            "distance": spread(np.array(seconds[ours]) / floor),
        }
    return found | more


def peak_mib(make: Callable[..., Callable[[], object]], *arguments: Any) -> float:
    """MiB by which a process of its own grows at most while the work runs that `make(*arguments)` returns.

    What `make` itself has made before, and the libraries, do not count.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_growth, make, arguments).result()


def _growth(make: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]) -> float:
    work = make(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = status("VmRSS")
    work()
    return (status("VmHWM") - before) / 2**10


def status(key: str, process: int | str = "self") -> int:
    """A line of a process's status in /proc, in KiB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def shares(work: Callable[[], object], most: int = 6) -> dict[str, float]:
    """Where the time of `work` goes: the share of each torch operation's own time, the largest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    events = profile.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    largest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:most]
    return {event.key: event.self_cpu_time_total / total for event in largest}


def write(name: str, content: dict[str, Any], *libraries: str) -> None:
    """docs/results/speed/<name>.json; libraries: whose versions it names besides torch and transformers."""
    told = {"command": f"python -m bench.speed {name}", "machine": machine(*libraries), "clock": CPU, **content}
    told["machine"]["threads"] = torch.get_num_threads()
    SPEED.mkdir(parents=True, exist_ok=True)
    (SPEED / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told, indent=1))
