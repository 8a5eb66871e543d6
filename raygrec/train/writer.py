"""Checkpoints are written behind the loop's back: on one thread, from a copy of the state, one at a time."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Self

import torch

from raygrec.train.folder import LoopState, RunFolder


class CheckpointWriter:
    """Rank 0's writer for one stage; what is in flight when the block ends is complete before the next line runs.

    An error of the thread, such as a `StorageError`, is raised by the next `check`, `save` or `wait`, or by the
    end of the block where that is not left by an exception of its own.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._last: Future[None] | None = None

    def save(
        self, state: LoopState, tensors: dict[str, torch.Tensor], best: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Waits for the checkpoint before this one, and returns while this one is written.

        tensors: on the CPU and the caller's no more. best: parameters that are the best so far; their file comes
        first, since the checkpoint relies on it.
        """
        self.wait()
        self._last = self._thread.submit(self._write, replace(state), tensors, best)

    def check(self) -> None:
        """Raises the error of a write that has failed; quick."""
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Returns once nothing is in flight."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def _write(self, state: LoopState, tensors: dict[str, torch.Tensor], best: dict[str, torch.Tensor] | None) -> None:
        if best is not None:
            self._folder.save_parts(self._folder.parts_file(state.stage), best)
        self._folder.save_checkpoint(state, tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()  # waits
        if error is None:
            self.wait()
