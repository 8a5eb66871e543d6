"""`ray job submit` to a real Ray with token authentication: stop, resume, and failures that say why."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

from raygrec.train.folder import RunFolder
from raygrec.train.local import train_here
from tests.cluster.test_launcher import wait_for
from tests.train.workers import tiny_sequential_config

pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not os.environ.get("RAYGREC_SLOW"), reason="takes two minutes; RAYGREC_SLOW=1 runs it"),
]

ROOT = Path(__file__).parent.parent.parent
DRIVER = '{"train_driver": 1}'
TOKEN = "a-token-of-this-test-and-of-no-other-cluster"
# Long enough to be stopped in the middle of it.
LONG = {"epochs": 40, "patience": 40, "evaluate_every": 10, "checkpoint_every": 100}


@pytest.fixture(scope="module")
def submit(tmp_path_factory):
    """Calls `ray job …` against a head of its own, which two drivers and four CPUs fit on."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "RAYGREC_"))}
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(f"{TOKEN}\n")
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    ports = free_ports(2)
    environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{ports[1]}"
    session = tempfile.mkdtemp(prefix="rg", dir="/tmp")  # sockets want short paths
    command = ["start", "--head", "--block", f"--port={ports[0]}", f"--dashboard-port={ports[1]}", "--num-cpus=4"]
    command += ['--resources={"train_driver": 2}', f"--temp-dir={session}", "--disable-usage-stats"]
    log = Path(session) / "head.log"
    with log.open("w") as output:
        head = subprocess.Popen(ray(*command), env=environment, stdout=output, stderr=output)

    def call(*arguments: object) -> subprocess.CompletedProcess:
        return subprocess.run(ray("job", *arguments), env=environment, cwd=ROOT, capture_output=True, text=True)

    def ask(path: str, method: str = "GET", bearer: str = TOKEN) -> dict:
        """What the head answers: `ray job stop` asks the same, but takes seconds to start."""
        headers = {"Authorization": f"Bearer {bearer}"}
        request = urllib.request.Request(f"http://127.0.0.1:{ports[1]}/api/jobs/{path}", headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    call.ask = ask
    try:
        wait_for(lambda: call("list").returncode == 0 or head.poll() is not None, 90)
        assert head.poll() is None, log.read_text()
        yield call
    finally:
        # Not `ray stop`, which ends every Ray of the machine.
        for process in [*psutil.Process(head.pid).children(recursive=True), head]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait(10)
        shutil.rmtree(session, ignore_errors=True)


def ray(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", *map(str, arguments)]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


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
