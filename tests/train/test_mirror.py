import shutil
import threading
from pathlib import Path

import pytest
import torch

from raygrec import remote
from raygrec.errors import InputError
from raygrec.train import loop
from raygrec.train.folder import LoopState, RunFolder
from raygrec.train.local import train_here
from raygrec.train.mirror import Mirror, restore
from raygrec.train.settings import run_config
from tests.train.test_faults import assert_same_end
from tests.train.test_folder import flip
from tests.train.workers import cut_here, tiny_sequential_config

TENSORS = {"param/w": torch.arange(6.0)}


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    config = tiny_sequential_config(tmp_path / "store", tmp_path / "backbone", tmp_path / "run")
    folder = RunFolder(config.out)
    folder.start(config, resume=False)
    return folder


def there(place: Path) -> list[str]:
    return sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())


FILES = ("loop.json", "manifest.json", "state.safetensors")


def test_the_newest_checkpoints_are_kept_there_too(folder, tmp_path, monkeypatch):
    order, put = [], remote.Place.put
    monkeypatch.setattr(remote.Place, "put", lambda self, file, name: (order.append(name), put(self, file, name)))
    for step in (1, 2, 3):
        with Mirror(folder, f"file://{tmp_path}/there") as mirror:
            folder.saved = mirror.ask
            folder.report({"step": step})
            folder.write_metrics({})
            folder.save_checkpoint(LoopState("train", step, records=step), TENSORS)
    assert there(tmp_path / "there") == sorted(
        [
            "config.yaml",
            "history.jsonl",
            *(f"checkpoints/train-0000000{step}/{file}" for step in (2, 3) for file in FILES),
        ]
    )
    assert (tmp_path / "there" / "history.jsonl").read_text() == folder.history_file.read_text()
    # What a checkpoint relies on is there before it, and its manifest last of all.
    assert order.index("history.jsonl") < order.index("checkpoints/train-00000001/state.safetensors")
    assert [name for name in order if "train-00000003" in name][-1] == "checkpoints/train-00000003/manifest.json"
    assert order[-1].endswith("manifest.json")


def test_checkpoints_of_a_try_before_are_not_kept_there(folder, tmp_path):
    """Those after the step that the run went on from, and one at a step that has come again."""
    with Mirror(folder, f"file://{tmp_path}/there") as mirror:
        folder.saved = mirror.ask
        for step in (2, 3, 4, 3):
            folder.save_checkpoint(LoopState("train", step), {"param/w": torch.rand(3)})
            mirror._waiting.result()
            if step == 4:
                shutil.rmtree(folder.checkpoints / "train-00000004")
    assert [name for name in there(tmp_path / "there") if "manifest" in name] == [
        "checkpoints/train-00000003/manifest.json"
    ]
    for file in FILES:
        here = folder.checkpoints / "train-00000003" / file
        assert (tmp_path / "there" / "checkpoints" / "train-00000003" / file).read_bytes() == here.read_bytes()


def test_a_slow_address_holds_up_nothing_and_misses_what_is_old(folder, tmp_path, monkeypatch):
    gate, put = threading.Event(), remote.Place.put
    monkeypatch.setattr(remote.Place, "put", lambda *arguments: (gate.wait(30), put(*arguments)))
    lines: list[str] = []
    with Mirror(folder, f"file://{tmp_path}/there", lines.append) as mirror:
        folder.saved = mirror.ask
        for step in range(1, 8):
            folder.save_checkpoint(LoopState("train", step), TENSORS)
        assert not (tmp_path / "there").exists()
        gate.set()
    complete = [name for name in there(tmp_path / "there") if name.endswith("manifest.json")]
    assert complete == ["checkpoints/train-00000007/manifest.json"]
    assert lines == []


def test_an_address_that_fails_is_told_once_per_kind(folder, tmp_path, monkeypatch):
    errors = iter([OSError(5, "broken"), OSError(5, "broken again"), OSError(28, "full"), OSError(5, "broken"), None])
    put, failing = remote.Place.put, []

    def unlucky(self: remote.Place, file: Path, name: str) -> None:
        if failing:
            raise failing[0]
        put(self, file, name)

    monkeypatch.setattr(remote.Place, "put", unlucky)
    lines: list[str] = []
    for step, error in enumerate(errors, start=1):
        failing[:] = [error] if error else []
        if step == 1:
            mirror = Mirror(folder, f"file://{tmp_path}/there", lines.append)
        folder.save_checkpoint(LoopState("train", step), TENSORS)
        mirror.ask(f"train-0000000{step}")
        mirror._waiting.result()
    said = [line.partition(" could not be copied there (")[::2] for line in lines]
    assert [(start.rpartition(": ")[2], why.partition(")")[0]) for start, why in said] == [
        ("train-00000001", "[Errno 5] broken"),
        ("train-00000003", "[Errno 28] full"),
    ]
    assert "checkpoints/train-00000005/manifest.json" in there(tmp_path / "there")


@pytest.fixture(scope="module")
def whole(tiny_store, tiny_backbone, tmp_path_factory) -> RunFolder:
    config = tiny_sequential_config(tiny_store.path, tiny_backbone, tmp_path_factory.mktemp("whole") / "run")
    train_here(config)
    return RunFolder(config.out)


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_a_run_whose_folder_is_lost_goes_on_from_the_address(whole, s3, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setenv("RAYGREC_QUIET", "0")
    address = s3("lost/run") if kind == "s3" else f"file://{tmp_path}/there"
    settings = {"out": tmp_path / "run", "upload": address, "upload_checkpoints": True}
    config = whole.config().model_copy(update=settings)
    ask = Mirror.ask
    with pytest.MonkeyPatch.context() as patch:  # none is left out because a newer one came meanwhile
        patch.setattr(Mirror, "ask", lambda mirror, name: (ask(mirror, name), mirror._waiting.result()))
        cut_here(config, 7)
    shutil.rmtree(config.out)
    if kind == "file":  # the newest has not come whole
        flip(tmp_path / "there" / "checkpoints" / "train-00000006" / "state.safetensors")
    steps, step = [], loop._step
    monkeypatch.setattr(loop, "_step", lambda *arguments: (steps.append(1), step(*arguments))[1])
    train_here(config, resume=True)
    folder = RunFolder(config.out)
    assert len(steps) == 16 - (4 if kind == "file" else 6)
    assert_same_end(folder, whole)
    assert [record["loss"] for record in folder.history()] == [record["loss"] for record in whole.history()]
    assert f"{config.out}: fetched from {address}" in capsys.readouterr().err
    # A run that was finished comes back whole, and no other one takes its place.
    shutil.rmtree(config.out)
    with pytest.raises(InputError, match=r"run.*: holds a run already; pass --resume to fetch it and go on, or name"):
        train_here(config)
    assert not config.out.exists()
    train_here(config, resume=True)
    assert len(steps) == 16 - (4 if kind == "file" else 6)
    assert_same_end(folder, whole)


def test_where_nothing_is_fetched(whole, tmp_path):
    settings = {"out": tmp_path / "run", "upload": f"file://{tmp_path}/nothing", "upload_checkpoints": True}
    config = whole.config().model_copy(update=settings)
    restore(config, RunFolder(config.out), resume=True)
    assert not config.out.exists()
    restore(config.model_copy(update={"out": whole.path}), whole, resume=True)
    gone = config.model_copy(update={"upload": "s3://nobody/here?nonsense=1"})
    with pytest.raises(InputError, match=r"s3://nobody/here.*: cannot be read, or not fetched to .*run \("):
        restore(gone, RunFolder(config.out), resume=True)
    with pytest.raises(InputError, match="upload_checkpoints=true needs an address in upload"):
        run_config({"store": "s", "out": "o", "upload_checkpoints": True}, "run.yaml")
