import os
import signal
import subprocess
import sys

import pytest

from raygrec.errors import InputError
from raygrec.train.lock import held

HOLDER = """
import sys, time
from pathlib import Path
from raygrec.train.lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(file, seconds: float) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, file, str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_goes_with_its_process(tmp_path):
    file = tmp_path / "lock"
    process = holder(file, 60)
    message = rf": process {process.pid} on {os.uname().nodename} is at work there; "
    with pytest.raises(InputError, match=message), held(file):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with held(file), pytest.raises(InputError, match=f": process {os.getpid()} on "), held(file):
        pass
    with held(file):
        pass


def test_a_lock_can_be_waited_for(tmp_path):
    process = holder(tmp_path / "lock", 0.5)
    with held(tmp_path / "lock", wait=30):
        assert process.wait(10) == 0


def test_a_lock_is_given_back_though_a_fork_has_it_open(tmp_path):
    reader, writer = os.pipe()
    with held(tmp_path / "lock"):
        child = os.fork()
        if not child:
            os.close(writer)
            os.read(reader, 1)  # until the test has ended
            os._exit(0)
    with held(tmp_path / "lock"):
        pass
    os.close(writer)
    os.waitpid(child, 0)


def test_a_lock_is_no_way_to_another_file(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "lock").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic links"), held(tmp_path / "lock"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
