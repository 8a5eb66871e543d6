"""Live figures: what they are is in test_engine.py, here is how they come to those who watch."""

import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from raygrec.errors import InputError
from raygrec.train import loop, trackers
from raygrec.train.folder import RunFolder
from raygrec.train.local import train_here
from raygrec.train.settings import RunConfig
from raygrec.train.trackers import WeightsAndBiases, tracked
from tests.train.workers import cut_here, tiny_sequential_config


class Heard(loop.Reporter):
    """A reporter that keeps its warnings."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def warn(self, line: str) -> None:
        self.lines.append(line)


class Kept:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.points: list[tuple[str, int, dict[str, float]]] = []
        self.closed: bool | None = None

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        self.points.append((stage, step, values))

    def close(self, finished: bool) -> None:
        self.closed = finished


@pytest.fixture
def config(tmp_path) -> RunConfig:
    return tiny_sequential_config(tmp_path / "store", tmp_path / "backbone", tmp_path / "run")


@pytest.fixture
def folder(config) -> RunFolder:
    folder = RunFolder(config.out)
    folder.start(config, resume=False)
    return folder


def with_track(config: RunConfig, **track: object) -> RunConfig:
    return config.model_copy(update={"track": config.track.model_copy(update=track)})


def test_trackers_are_told_in_order_and_how_it_ended(config, folder):
    first, second = Kept(), Kept()
    with tracked(Heard(), config, folder, [first]) as reporter:
        assert reporter.every == config.track.every == 10
        for step in range(50):
            reporter.point("train", step, {"loss": float(step)})
    assert first.points == [("train", step, {"loss": float(step)}) for step in range(50)]
    assert first.closed is True
    with pytest.raises(KeyError), tracked(Heard(), config, folder, [second]):
        raise KeyError
    assert second.closed is False


def test_without_trackers_there_is_nothing_to_tell(config, folder):
    before = threading.active_count()
    with tracked(Heard(), config, folder) as reporter:
        assert reporter.every == 0
        assert threading.active_count() == before


def test_a_tracker_that_fails_is_named_once_and_dropped(config, folder):
    class Broken(Kept):
        def log(self, *point: object) -> None:
            raise ConnectionError("no route\nto host")

    heard, kept = Heard(), Kept()
    with tracked(heard, config, folder, [Broken(), kept]) as reporter:
        for step in range(5):
            reporter.point("train", step, {"loss": 1.0})
            time.sleep(0.02)
    assert heard.lines == ["Broken: no route to host; it is told nothing more, the run goes on"]
    assert len(kept.points) == 5


def test_a_tracker_that_hangs_holds_up_neither_the_loop_nor_the_others(config, folder, monkeypatch):
    monkeypatch.setattr(trackers, "CLOSING", 0.2)
    never = threading.Event()

    class Stuck(Kept):
        def log(self, *point: object) -> None:
            never.wait()

    heard, kept, begun = Heard(), Kept(), time.monotonic()
    with tracked(heard, config, folder, [Stuck(), kept]) as reporter:
        for step in range(1000):
            reporter.point("train", step, {"loss": 1.0})
        assert time.monotonic() - begun < 0.5
    assert time.monotonic() - begun < 5
    never.set()
    assert [line.partition(":")[0] for line in heard.lines] == ["Stuck"]
    assert len(kept.points) == 1000


@pytest.mark.parametrize(
    ("track", "package", "install"),
    [
        ({"mlflow": "sqlite:///x.db"}, "mlflow", "'raygrec[mlflow]'"),
        ({"mlflow": "http://host"}, "mlflow", "'raygrec[mlflow]'"),
        ({"wandb": "project"}, "wandb", "'raygrec[wandb]'"),
        ({"tensorboard": True}, "tensorboardX", "tensorboardX"),
    ],
)
def test_a_missing_package_is_said_before_anything_starts(
    tiny_store, tiny_backbone, tmp_path, monkeypatch, track, package, install
):
    monkeypatch.setitem(sys.modules, package, None)
    config = tiny_sequential_config(tiny_store.path, tiny_backbone, tmp_path / "run", track=track)
    with pytest.raises(InputError) as refused:
        train_here(config)
    name = next(iter(track))
    assert str(refused.value) == f"track.{name}: the package '{package}' is not installed: pip install {install}"
    assert not config.out.exists()


def cut_and_resumed(config: RunConfig, updates: int) -> RunFolder:
    """A run that was cut off after so many updates, and went on from the checkpoint before."""
    cut_here(config, updates)
    train_here(config, resume=True)
    return RunFolder(config.out)


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The numbered fields of a protobuf message: integers, or the bytes of all else."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            length = {1: 8, 5: 4}.get(key & 7) or varint()
            yield key >> 3, message[place : place + length]
            place += length


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag, as TensorBoard shows them: a session that begins at a step purges what is from there on."""
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack_from("<Q", content)
            event, content = dict(fields(content[12 : 12 + length])), content[16 + length :]
            step = event.get(2, 0)
            if dict(fields(event.get(7, b""))).get(1) == 1:
                found = {tag: [point for point in points if point[0] < step] for tag, points in found.items()}
            for number, value in fields(event.get(5, b"")):
                scalar = dict(fields(value))
                assert number == 1
                found.setdefault(scalar[1].decode(), []).append((step, *struct.unpack("<f", scalar[2])))
    return found


def test_tensorboard_shows_each_step_of_a_resumed_run_once(tiny_store, tiny_backbone, tmp_path, monkeypatch):
    track = {"tensorboard": True, "every": 1}
    config = tiny_sequential_config(tiny_store.path, tiny_backbone, tmp_path / "run", track=track)
    # Cut off after update 7, it goes on from update 6: the seventh is logged twice.
    folder = cut_and_resumed(config, 7)
    assert len(list((folder.path / "tensorboard" / "train").iterdir())) == 2
    found = scalars(folder.path / "tensorboard" / "train")
    assert [step for step, _ in found["loss"]] == list(range(1, 17))
    record = folder.history()[1]
    assert record["step"] == 8
    assert found["lr"][7][1] == pytest.approx(record["lr"])
    assert found["gradient_norm"][7][1] == pytest.approx(record["gradient_norm"], rel=1e-5)
    assert sum(loss for _, loss in found["loss"][4:8]) / 4 == pytest.approx(record["loss"], rel=0.1)
    assert [step for step, _ in found["valid/ndcg_at_3"]] == [4, 8, 12, 16]
    assert found["valid/ndcg_at_3"][1][1] == pytest.approx(record["valid"]["ndcg@3"])


def test_mlflow_goes_on_with_its_run(tiny_store, tiny_backbone, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra 'mlflow' is not installed")
    pytest.importorskip("sqlalchemy", reason="MLflow's stores of its own need it")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    track = {"mlflow": uri, "every": 1}
    config = tiny_sequential_config(tiny_store.path, tiny_backbone, tmp_path / "run", track=track)
    folder = cut_and_resumed(config, 7)
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("raygrec").experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["train.lr"] == "0.01"
    for key, steps in (("train/loss", range(1, 17)), ("valid/ndcg_at_3", (4, 8, 12, 16))):
        assert sorted(metric.step for metric in client.get_metric_history(run.info.run_id, key)) == list(steps)
    assert run.data.metrics["train/lr"] == pytest.approx(folder.history()[-1]["lr"])


def test_an_mlflow_server_that_is_not_there_ends_no_run(tiny_store, tiny_backbone, tmp_path, monkeypatch, capsys):
    pytest.importorskip("mlflow", reason="the extra 'mlflow' is not installed")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("RAYGREC_QUIET", "0")
    config = tiny_sequential_config(
        tiny_store.path, tiny_backbone, tmp_path / "run", train={"epochs": 1}, track={"mlflow": "http://127.0.0.1:9"}
    )
    assert "test" in train_here(config)
    lines = [line for line in capsys.readouterr().err.splitlines() if "MLflow: " in line]
    assert len(lines) == 1
    assert lines[0].endswith("; it is told nothing more, the run goes on")


def test_wandb_offline(tiny_store, tiny_backbone, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra 'wandb' is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = tiny_sequential_config(
        tiny_store.path, tiny_backbone, tmp_path / "run", track={"wandb": "project", "every": 1}
    )
    folder = cut_and_resumed(config, 7)
    name = (folder.path / "wandb.id").read_text()
    logs = sorted(Path(folder.path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert len(logs) == 2  # of two processes, which its server makes one run of
    assert all(b"train/gradient_norm" in log.read_bytes() for log in logs)


def test_wandb_is_told_of_no_step_that_its_server_has(config, folder, monkeypatch):
    told, begun = [], []

    def init(**settings: object) -> SimpleNamespace:
        begun.append(settings)
        return SimpleNamespace(
            summary={"train/step": 8},
            define_metric=lambda *names, **settings: None,
            log=told.append,
            finish=lambda code: told.append(code),
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=lambda **settings: settings))
    for _ in range(2):
        tracker = WeightsAndBiases("project", config, folder)
        for stage, step in (("train", 8), ("train", 12), ("histories", 4)):
            tracker.log(stage, step, {"loss": 0.5, "valid/hit_at_3": 0.25})
        tracker.close(True)
    once = [
        {"train/loss": 0.5, "valid/hit_at_3": 0.25, "train/step": 12},
        {"histories/loss": 0.5, "valid/hit_at_3": 0.25, "histories/step": 4},
        0,
    ]
    assert told == once * 2
    assert begun[0]["id"] == begun[1]["id"] != ""
    assert (begun[0]["name"], begun[0]["project"], begun[0]["resume"]) == ("run", "project", "allow")


def test_what_is_tracked_may_change_when_a_run_goes_on(config, folder):
    folder.start(with_track(config, every=3, tensorboard=True), resume=True)
    assert folder.config().track.every == 3
