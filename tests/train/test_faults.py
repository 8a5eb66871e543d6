"""Faults that really happen to a run: its process is killed while it writes, its disk fills up, its files rot."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from raygrec.errors import InputError
from raygrec.train import folder as folder_module
from raygrec.train import loop, manifest
from raygrec.train.folder import LoopState, RunFolder
from raygrec.train.local import train_here
from raygrec.train.writer import CheckpointWriter
from tests.train.test_folder import flip
from tests.train.workers import tiny_sequential_config

TENSORS = [{"param/w": torch.full((1000,), float(step))} for step in range(3)]


def in_background(folder: RunFolder, *arguments: object) -> None:
    with CheckpointWriter(folder) as writer:
        writer.save(*arguments)


def killed_while_saving(folder: RunFolder, save: Callable, module: object, function: str, before: bool) -> None:
    """A process of its own saves step 2, and is killed before or after it calls `function`."""
    child = os.fork()
    if not child:
        plain = getattr(module, function)

        def deadly(*arguments: object, **named: object) -> None:
            if not before:
                plain(*arguments, **named)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(module, function, deadly)
        save(folder, LoopState("train", 2), TENSORS[2])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("save", [RunFolder.save_checkpoint, in_background], ids=["here", "background"])
@pytest.mark.parametrize(
    ("module", "function", "before", "step"),
    [
        (folder_module, "save_file", True, 1),
        (folder_module, "save_file", False, 1),
        (manifest, "sync", True, 1),
        (manifest, "seal", False, 1),
        (Path, "rename", True, 1),
        (Path, "rename", False, 2),
    ],
)
def test_killed_while_it_saves(tmp_path, save, module, function, before, step):
    folder, lines = RunFolder(tmp_path), []
    folder.save_checkpoint(LoopState("train", 1), TENSORS[1])
    killed_while_saving(folder, save, module, function, before)
    state, tensors = folder.last_checkpoint("train", lines.append)
    assert state.step == step
    assert torch.equal(tensors["param/w"], TENSORS[step]["param/w"])
    assert lines == []
    folder.save_checkpoint(LoopState("train", 2), TENSORS[2])
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["train-00000001", "train-00000002"]


@pytest.fixture(scope="module")
def whole(tiny_store, tiny_backbone, tmp_path_factory) -> RunFolder:
    """A run that nothing happened to: 16 updates, a checkpoint after every second."""
    config = tiny_sequential_config(tiny_store.path, tiny_backbone, tmp_path_factory.mktemp("whole") / "run")
    train_here(config)
    return RunFolder(config.out)


def assert_same_end(folder: RunFolder, whole: RunFolder) -> None:
    for one in ("valid", "test", "baselines"):
        assert folder.metrics()[one] == whole.metrics()[one]
    expected = whole.load_parts(whole.model_file)
    found = folder.load_parts(folder.model_file)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.fixture
def cut(tiny_store, tiny_backbone, tmp_path, monkeypatch):
    """A run that was cut off after update 7: checkpoints of updates 4 and 6."""
    config = tiny_sequential_config(tiny_store.path, tiny_backbone, tmp_path / "run")
    step, seen = loop._step, []

    def counted(*arguments: object) -> object:
        seen.append(1)
        if len(seen) > 7:
            raise KeyboardInterrupt
        return step(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "_step", counted)
        train_here(config)
    folder = RunFolder(config.out)
    assert sorted(path.name for path in folder.checkpoints.glob("train-*")) == ["train-00000004", "train-00000006"]
    return folder


@pytest.mark.parametrize("damage", [flip, lambda file: os.truncate(file, file.stat().st_size // 2)])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(cut, whole, damage, capsys, monkeypatch):
    monkeypatch.setenv("RAYGREC_QUIET", "0")
    damage(cut.checkpoints / "train-00000006" / "state.safetensors")
    train_here(cut.config(), resume=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(lines) == 1
    assert lines[0].endswith("this checkpoint is left out, the run goes on from train-00000004")
    assert_same_end(cut, whole)
    assert [record["loss"] for record in cut.history()] == [record["loss"] for record in whole.history()]


def test_best_parameters_that_are_damaged_are_not_gone_on_with(cut):
    file = cut.parts_file("train")
    flip(file)
    with pytest.raises(
        InputError, match=r"train\.safetensors: is missing or damaged, and no other file holds the best"
    ):
        train_here(cut.config(), resume=True)


def command(config: Path, *options: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "raygrec.cli", "train", str(config), "--local", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_full_disk_ends_the_run_with_one_line_and_it_goes_on_when_there_is_room(whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    # Room for the best parameters and one checkpoint, not for two.
    newest = sum(file.stat().st_size for file in (whole.checkpoints / "train-00000016").iterdir())
    room = whole.parts_file("train").stat().st_size + int(1.8 * newest) + 2**15
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", disk]).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        config = whole.config().model_copy(update={"out": disk / "run"})
        (tmp_path / "run.yaml").write_text(config.model_dump_json())
        process = command(tmp_path / "run.yaml")
        _, error = process.communicate(timeout=300)
        assert process.returncode == 1
        lines = [line for line in error.splitlines() if "cannot be written" in line]
        assert len(lines) == 1, error
        assert "No space left on device" in lines[0]
        assert lines[0].startswith(f"raygrec: {config.out}/")
        assert "MiB needed" in lines[0]
        folder = RunFolder(config.out)
        assert folder.last_checkpoint("train")[0].step == 2
        assert not [path for path in config.out.rglob(".*.draft")]
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        process = command(tmp_path / "run.yaml", "--resume", "--json")
        output, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        assert json.loads(output.splitlines()[-1])["test"] == whole.metrics()["test"]
        assert_same_end(folder, whole)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_second_run_is_refused_while_the_first_is_alive(whole, tmp_path):
    """Whether it would begin or go on; and let in once the first was killed."""
    config = whole.config().model_copy(update={"out": tmp_path / "run"})
    folder = RunFolder(config.out)
    ready = "from raygrec.train.folder import RunFolder; import sys, time, pathlib\n"
    hold = "with RunFolder(pathlib.Path(sys.argv[1])).held():\n print('held', flush=True); time.sleep(300)"
    first = subprocess.Popen([sys.executable, "-c", ready + hold, config.out], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    for resume in (False, True):
        with pytest.raises(InputError, match=rf"run: process {first.pid} on \S+ is at work there"):
            train_here(config, resume)
    assert folder.metrics() is None
    first.send_signal(signal.SIGKILL)
    first.wait()
    train_here(config)
    assert_same_end(folder, whole)
