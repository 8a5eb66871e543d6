"""What the driver, controller and workers of a run tell each other; without torch and Ray Train."""

from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raygrec.cluster.heartbeat import Pulses


@dataclass(frozen=True)
class Failure:
    """What a worker raised that every restart would raise again."""

    wrong_input: bool
    message: str
    trace: str


class Board(Pulses):
    """An actor that holds what rank 0 last said, for the driver to draw, what ended the run, and the heartbeats."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, int, int, str]] = []
        self.failure: Failure | None = None
        self.controller: Any = None

    def tell(self, task: str, done: int, total: int, note: str) -> None:
        if self.lines and self.lines[-1][0] == task and self.lines[-1][1] < self.lines[-1][2]:
            self.lines.pop()
        self.lines.append((task, done, total, note))

    def take(self) -> list[tuple[str, int, int, str]]:
        lines, self.lines = self.lines, []
        return lines

    def fail(self, failure: Failure) -> None:
        self.failure = self.failure or failure

    def failed(self) -> Failure | None:
        return self.failure

    def controlled_by(self, controller: Any) -> None:
        self.controller = controller

    def controlled(self) -> Any:
        return self.controller


def put_up_board() -> Any:
    """A board where the driver is, and nowhere else: on a node that is lost, it would take the run with it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    lasting = {"max_restarts": -1, "max_task_retries": -1}
    return ray.remote(num_cpus=0, scheduling_strategy=here, **lasting)(Board).remote()
