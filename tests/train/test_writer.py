import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from raygrec.errors import StorageError
from raygrec.train import folder as folder_module
from raygrec.train.engine import EngineConfig, LocalEngine
from raygrec.train.folder import LoopState, RunFolder
from raygrec.train.loop import run_stage
from raygrec.train.writer import CheckpointWriter
from tests.test_storage import file_limit
from tests.train.test_engine import Silent, TwoTerms, two_terms_stage

TENSORS = {"param/w": torch.arange(6.0)}


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


@pytest.fixture
def gate(monkeypatch):
    """Writes stand still, with nothing on the disk, until it is set; `gate.done` holds the steps that were written."""
    event, done, best, plain = threading.Event(), [], [], RunFolder.save_checkpoint

    def slow(self: RunFolder, state: LoopState, tensors: dict[str, torch.Tensor]) -> None:
        assert event.wait(30)
        best.append(self.has_parts(self.parts_file(state.stage)))
        plain(self, state, tensors)
        done.append(state.step)

    monkeypatch.setattr(RunFolder, "save_checkpoint", slow)
    event.done, event.best = done, best
    yield event
    event.set()


def test_the_loop_goes_on_while_a_checkpoint_is_written_and_what_it_changes_then_is_not_in_it(folder, gate):
    state = LoopState("train", 1, sums=[1.0], counts=[2.0])
    with CheckpointWriter(folder) as writer:
        writer.save(state, TENSORS, {"w": TENSORS["param/w"]})
        state.add([5.0], [7.0])
        state.step = 2
        writer.check()
        assert gate.done == []
        gate.set()
        writer.wait()
        assert gate.done == [1]
        assert gate.best == [True]  # it comes before the checkpoint that relies on it
    found, _ = folder.last_checkpoint("train")
    assert found == LoopState("train", 1, sums=[1.0], counts=[2.0])


def test_one_is_in_flight_at_a_time_and_all_are_written_in_order(folder, gate):
    threading.Timer(0.3, gate.set).start()
    with CheckpointWriter(folder) as writer:
        for step in range(1, 5):
            writer.save(LoopState("train", step), TENSORS)
            assert len(gate.done) >= step - 1
    assert gate.done == [1, 2, 3, 4]
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["train-00000003", "train-00000004"]


def test_what_is_in_flight_is_complete_also_where_the_run_is_cut_off(folder, gate):
    threading.Timer(0.3, gate.set).start()
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(folder) as writer:
        writer.save(LoopState("train", 1), TENSORS)
        raise KeyboardInterrupt
    assert gate.done == [1]


@pytest.mark.parametrize("how", ["check", "wait", "save", "end"])
def test_an_error_of_the_thread_comes_to_the_one_who_saves(folder, how):
    large = {"param/w": torch.zeros(2**20)}
    message = r"train-00000002: cannot be written: .* \(4\.00 MiB needed, [\d.]+ MiB left"
    with file_limit(2**20), pytest.raises(StorageError, match=message), CheckpointWriter(folder) as writer:
        writer.save(LoopState("train", 1), TENSORS)
        writer.save(LoopState("train", 2), large)
        writer._thread.shutdown()  # waits for it, and raises nothing
        if how == "check":
            writer.check()
        if how == "wait":
            writer.wait()
        if how == "save":
            writer.save(LoopState("train", 3), TENSORS)
        assert how == "end"
    assert folder.last_checkpoint("train")[0].step == 1
    assert [path.name for path in folder.checkpoints.iterdir()] == ["train-00000001"]


def test_a_run_whose_disk_is_full_ends_at_the_next_step(folder, monkeypatch):
    """With the one line of the thread, and with the checkpoint before in its place."""
    save, written = folder_module.save_file, threading.Event()

    def full(tensors: dict[str, torch.Tensor], file: object) -> None:
        if "00000003" in str(file):
            written.set()
            raise OSError(28, "No space left on device")
        save(tensors, file)

    def build(things: np.ndarray, draws: object) -> object:
        steps.append(1)
        if len(steps) == 2 * 4:  # the second micro-batch of the fourth update: its check comes after the error
            assert written.wait(30)
        return stage.build(things, draws)

    steps, stage = [], two_terms_stage(epochs=4)
    monkeypatch.setattr(folder_module, "save_file", full)
    with pytest.raises(StorageError, match="train-00000003: cannot be written: No space left on device"):
        run_stage(replace(stage, build=build), LocalEngine(TwoTerms(), EngineConfig()), 0, folder, Silent())
    assert len(steps) <= 2 * 5
    assert folder.last_checkpoint("train")[0].step == 2


def test_a_checkpoint_before_a_node_goes_away_is_complete_before_the_next_step(folder, gate, monkeypatch):
    monkeypatch.setattr("raygrec.train.loop.ASK_EVERY", -1.0)

    class Noticed(Silent):
        step = 0

        def at(self, task: str, step: int) -> None:
            assert step != 2 or gate.done == [1]
            self.step = step

        def wants_checkpoint(self) -> bool:
            threading.Timer(0.3, gate.set).start()
            return self.step == 1

    stage = two_terms_stage()
    stage = replace(stage, config=stage.config.model_copy(update={"checkpoint_every": 99}))
    run_stage(stage, LocalEngine(TwoTerms(), EngineConfig()), 0, folder, Noticed())
    assert gate.done == [1, 2, 4]
