"""Names the worker that the others wait for: heartbeats with each rank's step, and who reads them."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

BEAT_EVERY = 2.0  # seconds
LOOK_EVERY = 5.0
STARTING_UP = ("start-up", 0)  # before the first step
PACKAGE = str(Path(__file__).parent.parent)
COLLECTIVES = (os.path.join("torch", "distributed"), os.path.join("deepspeed", "comm"))


@dataclass(frozen=True)
class Beat:
    """What a rank says every few seconds.

    group: of workers, which a restart replaces; a later one has a greater number. at: task and step. inside: the
    function of this package that it is in. waits: whether it waits there for the other ranks.
    """

    group: int
    rank: int
    at: tuple[str, int]
    inside: str
    waits: bool
    node: str
    pid: int


@dataclass(frozen=True)
class Pulse:
    """A rank's last beat, and how many seconds ago it was heard and its step began."""

    beat: Beat
    heard: float
    still: float


class Pulses:
    """The board's side: the last beat of each rank of the newest group."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._group = 0
        self._last: dict[int, tuple[Beat, float, float]] = {}

    def beat(self, beat: Beat) -> None:
        if beat.group < self._group:
            return
        if beat.group > self._group:
            self._group, self._last = beat.group, {}
        now = self._clock()
        before = self._last.get(beat.rank)
        self._last[beat.rank] = (beat, now, before[2] if before and before[0].at == beat.at else now)

    def ended(self, group: int, rank: int) -> None:
        if group == self._group:
            self._last.pop(rank, None)

    def pulses(self) -> list[Pulse]:
        now = self._clock()
        return [Pulse(beat, now - heard, now - moved) for _, (beat, heard, moved) in sorted(self._last.items())]


class Heart:
    """The worker's side: says where the thread that made it stands, from a thread of its own."""

    def __init__(self, board: Any, group: int, rank: int) -> None:
        self.at = STARTING_UP
        self._board, self._group, self._rank = board, group, rank
        self._watched = threading.get_ident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    @contextmanager
    def beating(self) -> Iterator["Heart"]:
        """Beats while the block runs."""
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join(BEAT_EVERY)
            self._board.ended.remote(self._group, self._rank)

    def _beat(self) -> None:
        node, pid = ray.get_runtime_context().get_node_id(), os.getpid()
        while True:
            inside, waits = standing(sys._current_frames().get(self._watched))
            self._board.beat.remote(Beat(self._group, self._rank, self.at, inside, waits, node, pid))
            if self._stop.wait(BEAT_EVERY):
                return


def standing(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost function of this package, and whether it stands in a collective."""
    waits = False
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE):
            return f"{frame.f_code.co_name} ({Path(file).name}:{frame.f_lineno})", waits
        waits = waits or any(part in file for part in COLLECTIVES)
        frame = frame.f_back
    return "", waits


def stalled(pulses: list[Pulse], seconds: float) -> list[Pulse]:
    """The ranks that the others wait for, where none has begun a step for so long; [] while the run moves.

    Ranks that are not heard any more while others are; else those that do not wait in a collective while others do;
    else, where nobody can be told apart, all. A group of which no rank is heard is not there: it is being started.
    """
    silent = [pulse for pulse in pulses if pulse.heard > seconds / 2]
    if len(silent) == len(pulses) or any(pulse.still < seconds for pulse in pulses):
        return []
    busy = [pulse for pulse in pulses if not pulse.beat.waits]
    return silent or busy or pulses


def described(culprits: list[Pulse], pulses: list[Pulse]) -> str:
    """One line: which ranks, at which step, since when."""
    still = min(pulse.still for pulse in pulses)
    parts = []
    for pulse in culprits:
        beat = pulse.beat
        place = f"step {beat.at[1]} of {beat.at[0]}" if beat.at != STARTING_UP else "its start-up"
        quiet = f"was last heard of {pulse.heard:.0f} s ago" if pulse.heard > 2 * BEAT_EVERY else f"is in {beat.inside}"
        parts.append(f"rank {beat.rank} stands at {place} and {quiet}")
    others = "; the others wait" if len(culprits) < len(pulses) else ""
    return f"no worker has moved for {still:.0f} s: {', '.join(parts)}{others}"


class Watch:
    """The driver's side: says a line about a stalled group, and ends it after the same time again."""

    def __init__(self, board: Any, seconds: float, say: Callable[[str], None]) -> None:
        self._board, self._seconds, self._say = board, seconds, say
        self._looked = time.monotonic()
        self._said = self._ended = 0  # groups: what was said of, or ended, last
        self.line = ""
        """What was said of the group that was ended last, while no other has begun."""

    def look(self) -> None:
        """Quick, and at most every few seconds; never raises for the board's or the workers' sake."""
        if time.monotonic() - self._looked < min(LOOK_EVERY, self._seconds / 4):
            return
        self._looked = time.monotonic()
        try:
            pulses: list[Pulse] = ray.get(self._board.pulses.remote(), timeout=10)
        except ray.exceptions.RayError:
            return  # the board is slow or gone
        group = pulses[0].beat.group if pulses else self._ended
        if group != self._ended:
            self.line = ""
        if any(pulse.still < self._seconds for pulse in pulses):
            self._said = 0  # it moves: another stall is worth another line
        culprits = stalled(pulses, self._seconds)
        if not culprits or group == self._ended:
            return
        if group != self._said:
            self._said = group
            self._say(described(culprits, pulses))
        # How long a start takes, with weights to fetch and kernels to compile, nobody knows.
        begun = all(pulse.beat.at != STARTING_UP for pulse in pulses)
        if begun and min(pulse.still for pulse in pulses) >= 2 * self._seconds:
            self._ended, self.line = group, described(culprits, pulses)
            names = ", ".join(str(pulse.beat.rank) for pulse in culprits)
            self._say(f"rank {names} is ended, so that the workers start again")
            for pulse in culprits:
                _end(pulse.beat)


def _end(beat: Beat) -> None:
    """Kills a worker from a process of its own node: a stopped one answers nothing but the kernel."""
    there = NodeAffinitySchedulingStrategy(beat.node, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(kill_worker)
    with suppress(ray.exceptions.RayError):  # the whole node is gone, and Ray will know it
        ray.get(task.remote(beat.pid), timeout=60)


def kill_worker(pid: int) -> None:
    """SIGKILL, unless the number is another process's by now."""
    with suppress(OSError):
        if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
