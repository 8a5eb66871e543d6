import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from raygrec.errors import InputError
from raygrec.train.engine import NonFiniteError
from raygrec.train.folder import RunFolder
from raygrec.train.local import train_here
from tests.train.workers import tiny_config, tiny_sequential_config

psutil = pytest.importorskip("psutil")
launcher = pytest.importorskip("raygrec.cluster.launcher", reason="Ray is not installed")
pytestmark = pytest.mark.cluster

BAR_LINE = re.compile(r"(?P<task>[\w @,-]+): [\d,]+/[\d,]+ (in|so far).*\d/s.*")
# Long enough for a worker to be shot in the middle of it.
LONG = {"epochs": 30, "patience": 30, "evaluate_every": 10, "checkpoint_every": 100}


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def workers_below(process: subprocess.Popen) -> list[psutil.Process]:
    return [one for one in psutil.Process(process.pid).children(recursive=True) if "RayTrainWorker" in one.name()]


def test_a_run_that_loses_a_worker_ends_as_the_run_in_one_process(tiny_store, tiny_backbone, tmp_path):
    alone = tiny_sequential_config(tiny_store.path, tiny_backbone, tmp_path / "alone", train=LONG)
    expected = train_here(alone)
    config = alone.model_copy(update={"out": tmp_path / "run"})
    (tmp_path / "run.yaml").write_text(config.model_dump_json())  # JSON is YAML
    folder = RunFolder(config.out)
    process = subprocess.Popen(
        [sys.executable, "-m", "raygrec.cli", "train", tmp_path / "run.yaml", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"RAYGREC_QUIET": "0"},
    )
    wait_for(lambda: list(folder.checkpoints.glob("train-*")) or process.poll() is not None, 900)
    shot = workers_below(process)[-1]
    shot.send_signal(signal.SIGKILL)
    output, error = process.communicate(timeout=900)
    assert process.returncode == 0, error
    assert not shot.is_running()
    # Standard output holds the document, standard error what our bars leave behind, and nothing else speaks.
    metrics = json.loads(output)
    lines = error.splitlines()
    lines.remove("a worker was lost; the run goes on from its last checkpoint")
    assert all(BAR_LINE.fullmatch(line) for line in lines), error
    assert any(line.startswith("starting workers: 2/2") for line in lines)
    for split in ("valid", "test"):
        assert metrics[split] == pytest.approx(expected[split], abs=1e-6)
    losses = [[record["loss"] for record in one.history()] for one in (folder, RunFolder(alone.out))]
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_a_failure_that_would_recur_ends_the_run_with_one_line(local_ray, tiny_store, tiny_backbone, tmp_path):
    config = tiny_config(
        tiny_store.path,
        tiny_backbone,
        tmp_path / "run",
        alignment={"epochs": 0},
        histories={"epochs": 0},
        train={"lr": 1e30},
        cluster={"workers": 1},
    )
    with pytest.raises(launcher.WorkerError) as failed:
        launcher.train_on_ray(config)
    message, log = str(failed.value), config.out / "ray" / "failure.log"
    assert "\n" not in message
    assert re.fullmatch(
        r"train: the loss is (nan|inf) in step \d+ .* in \S+not_finite\.json; .*lower train\.lr; .* in (\S+)", message
    )
    assert message.endswith(str(log))
    assert "Traceback" in log.read_text()
    assert RunFolder(config.out).metrics() is None


def test_workers_that_the_cluster_cannot_hold_are_refused(local_ray, tiny_store, tiny_backbone, tmp_path):
    config = tiny_config(tiny_store.path, tiny_backbone, tmp_path / "run", cluster={"workers": 500})
    with pytest.raises(InputError, match=r"cluster\.workers=500 × 1 CPU = 500 CPU, the cluster has \d+; ask for fewer"):
        launcher.train_on_ray(config)
    assert not config.out.exists()


# ---- what needs no Ray running


@pytest.mark.parametrize("address", ["127.0.0.1:9", "127.0.0.1:port"])
def test_an_address_without_a_cluster_is_refused_at_once(address):
    with pytest.raises(InputError, match=rf"RAY_ADDRESS={address}: no Ray cluster answers there \("):
        launcher._join(address, {})


@pytest.mark.parametrize("rank", [0, 1])
def test_each_notice_of_a_lost_node_is_taken_up_once_by_every_rank(monkeypatch, rank):
    first = launcher.train.PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [1]})
    both = launcher.train.PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [1], "b": [0]})
    heard, told = iter([None, first, first, both, None]), []
    monkeypatch.setattr(launcher.train, "get_preemption_info", lambda: next(heard))
    monkeypatch.setattr(launcher.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: rank))
    board = SimpleNamespace(tell=SimpleNamespace(remote=lambda *line: told.append(line[0])))
    reporter = launcher.RayReporter(board, SimpleNamespace())
    assert [reporter.wants_checkpoint() for _ in range(5)] == [False, True, False, True, False]
    lines = [f"the node of rank {ranks} will be taken away; a checkpoint is written now" for ranks in ("1", "0, 1")]
    assert told == ([] if rank else lines)


@pytest.mark.parametrize(("workers", "failures"), [(2, 3), ((1, 2), -1)])
def test_a_variable_number_of_workers_is_rays_and_waits_for_places(
    tiny_store, tiny_backbone, tmp_path, monkeypatch, workers, failures
):
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60")
    cluster = {"workers": workers, "max_preemptions": 7}
    config = tiny_config(tiny_store.path, tiny_backbone, tmp_path / "run", cluster=cluster)
    trainer = launcher._trainer(config, RunFolder(config.out), None, 3)
    assert trainer.scaling_config.num_workers == workers
    policy = trainer.run_config.failure_config
    assert (policy.controller_failure_limit, policy.max_preemption_failures) == (failures, 7)


def test_what_is_said_when_workers_start_again():
    assert launcher._restarted(2, 2) == "a worker was lost; the run goes on from its last checkpoint"
    assert launcher._restarted(2, 1) == "workers: 1 instead of 2; the run goes on from its last checkpoint"


@pytest.mark.parametrize(
    ("error", "recurs"),
    [
        (InputError("wrong"), True),
        (NonFiniteError("nan"), True),
        (KeyError("x"), True),
        (RuntimeError("Connection closed by peer"), False),
        (OSError("Stale file handle"), False),
    ],
)
def test_what_would_happen_again(error, recurs):
    assert launcher._recurs(error) is recurs


def test_a_failure_is_explained_in_one_line(tmp_path):
    folder = RunFolder(tmp_path)
    log = tmp_path / "ray" / "failure.log"
    lost = launcher._explained(None, [RuntimeError("[Rank 0 Error]:\n  File x\nActorDiedError: gone\n")], folder)
    assert str(lost) == f"ActorDiedError: gone; the worker's traceback is in {log}"
    assert log.read_text() == "[Rank 0 Error]:\n  File x\nActorDiedError: gone\n"
    wrong = launcher._explained(launcher.Failure(True, "key 'x': no", "trace"), [], folder)
    assert isinstance(wrong, InputError)
    assert str(wrong) == "key 'x': no"
    assert log.read_text() == "trace\n"
