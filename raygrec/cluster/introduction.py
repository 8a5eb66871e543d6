"""How a run's driver comes to know Ray Train's controller; without torch, which that has no use for."""

from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback


class Introduction(ControllerCallback):
    """Tells the board who controls the workers: Ray Train's own way to end a run is for Ctrl-C alone."""

    def __init__(self, board: Any) -> None:
        self.board = board

    def after_controller_start(self, train_run_context: Any) -> None:
        self.board.controlled_by.remote(ray.get_runtime_context().current_actor)
