"""`ray job submit` to a real Ray with token authentication: stop, resume, and failures that say why."""

import json
import os
import subprocess
import urllib.error
from pathlib import Path

import pytest

from raygrec.train.folder import RunFolder
from raygrec.train.local import train_here
from tests.cluster.head import Head, ray
from tests.cluster.test_launcher import wait_for
from tests.train.workers import tiny_sequential_config

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not os.environ.get("RAYGREC_SLOW"), reason="takes two minutes; RAYGREC_SLOW=1 runs it"),
]

ROOT = Path(__file__).parent.parent.parent
DRIVER = '{"train_driver": 1}'
# Long enough to be stopped in the middle of it.
LONG = {"epochs": 40, "patience": 40, "evaluate_every": 10, "checkpoint_every": 100}


@pytest.fixture(scope="module")
def submit():
    """Calls `ray job …` against a head of its own, which two drivers and four CPUs fit on."""
    with Head("--num-cpus=4", '--resources={"train_driver": 2}') as head:

        def call(*arguments: object) -> subprocess.CompletedProcess:
            command = ray("job", *arguments)
            return subprocess.run(command, env=head.environment, cwd=ROOT, capture_output=True, text=True)

        call.ask = lambda path, *how, **more: head.ask(f"api/jobs/{path}", *how, **more)
        yield call


def job(submit, name: str, *command: object, wait: bool = True) -> subprocess.CompletedProcess:
    how = ["--runtime-env", "jobs/runtime_env.yaml", "--entrypoint-resources", DRIVER, "--submission-id", name]
    return submit("submit", *how, *([] if wait else ["--no-wait"]), "--", "python", *command)


def test_a_stopped_job_is_resumed_to_the_same_end(submit, tiny_store, tiny_backbone, tmp_path):
    changes = {"train": LONG, "cluster": {"workers": 1}}
    alone = tiny_sequential_config(tiny_store.path, tiny_backbone, tmp_path / "alone", **changes)
    config = alone.model_copy(update={"out": tmp_path / "run"})
    file = tmp_path / "run.yaml"
    file.write_text(config.model_dump_json())  # JSON is YAML
    folder = RunFolder(config.out)
    # The head answers before its agent, which starts jobs.
    wait_for(lambda: job(submit, "first", "jobs/train.py", file, wait=False).returncode == 0, 90)
    # Meanwhile, on the second driver's place.
    wrong = job(submit, "wrong", "jobs/train.py", file, "train.epoch=3")
    expected = train_here(alone)
    wait_for(lambda: list(folder.checkpoints.glob("train-*")) or folder.metrics(), 120)
    with pytest.raises(urllib.error.HTTPError, match=r"40[13]"):
        submit.ask("first/stop", "POST", bearer="another-token-that-is-as-long-as-the-right-one")
    assert submit.ask("first/stop", "POST") == {"stopped": True}
    wait_for(lambda: submit.ask("first")["status"] == "STOPPED", 30)
    assert folder.metrics() is None  # else it was faster than the stop
    resumed = job(submit, "second", "jobs/train.py", file, "--resume", "--json")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    metrics = folder.metrics()
    assert json.dumps(metrics) in resumed.stdout
    for split in ("valid", "test"):
        assert metrics[split] == pytest.approx(expected[split], abs=1e-6)
    losses = [[record["loss"] for record in one.history()] for one in (folder, RunFolder(alone.out))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    # The job that could not be.
    said = wrong.stdout + wrong.stderr
    assert wrong.returncode == 1
    assert "Job 'wrong' failed" in said
    assert "exit code 2" in said
    assert f"raygrec: {file}: unknown key 'train.epoch'; the nearest known key is 'train.epochs'" in said
    assert "Traceback" not in said
