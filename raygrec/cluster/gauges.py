"""Live figures as Ray metrics, which every node offers to Prometheus."""

import re
from pathlib import Path

from ray.util.metrics import Gauge


class Gauges:
    """A tracker (see `raygrec.train.trackers`): gauges `raygrec_…`, which cost nothing where nobody scrapes them.

    Tags: `run`, the name of the run folder, `out`, all of its path, since a sweep has many of one name, and `stage`.
    """

    def __init__(self, out: Path) -> None:
        self._tags = {"run": out.name, "out": str(out)}
        self._gauges: dict[str, Gauge] = {}

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        for name, value in {**values, "step": step}.items():
            if name not in self._gauges:
                safe = re.sub(r"\W", "_", name)
                keys = (*self._tags, "stage")
                self._gauges[name] = Gauge(f"raygrec_{safe}", f"{name}, of a run in progress", tag_keys=keys)
            self._gauges[name].set(value, tags={**self._tags, "stage": stage})

    def close(self, finished: bool) -> None:
        """Ray forgets the gauges of a process that has ended."""
