"""A real head of a Ray cluster, started as `ray start` does, with token authentication and ports of its own."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

from tests.cluster.test_launcher import wait_for

TOKEN = "a-token-of-these-tests-and-of-no-other-cluster"


class Head:
    """Runs while the block does; `environment` lets commands join it."""

    def __init__(self, *options: str, **environment: str) -> None:
        """options: of `ray start`. environment: of the head alone."""
        self._options, self._own = options, environment
        self._session = Path(tempfile.mkdtemp(prefix="rg", dir="/tmp"))  # sockets want short paths
        (self._session / "token").write_text(f"{TOKEN}\n")
        self._port, self._dashboard = free_ports(2)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "RAYGREC_"))}
        self.environment = kept | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._session / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self._dashboard}",
        }

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        command = ray("start", "--head", "--block", f"--port={self._port}")
        command += [
            *self._options,
            f"--dashboard-port={self._dashboard}",
            f"--temp-dir={self._session / 'ray'}",
            "--disable-usage-stats",
        ]
        log = self._session / "head.log"
        with log.open("w") as output:
            self._process = subprocess.Popen(command, env=self.environment | self._own, stdout=output, stderr=output)
        try:
            wait_for(lambda: self._answers() or self._process.poll() is not None, 90)
            assert self._process.poll() is None, log.read_text()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *why: object) -> None:
        # Not `ray stop`, which ends every Ray of the machine.
        for process in [*psutil.Process(self._process.pid).children(recursive=True), self._process]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait(10)
        shutil.rmtree(self._session, ignore_errors=True)

    def ask(self, path: str, method: str = "GET", bearer: str = TOKEN) -> dict:
        """What the dashboard answers: the `ray` command asks the same, but takes seconds to start."""
        headers = {"Authorization": f"Bearer {bearer}"}
        place = f"http://127.0.0.1:{self._dashboard}/{path}"
        with urllib.request.urlopen(urllib.request.Request(place, headers=headers, method=method), timeout=30) as found:
            return json.load(found)

    def _answers(self) -> bool:
        try:
            return self.ask("api/jobs/") is not None
        except OSError:
            return False


def ray(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", *map(str, arguments)]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
