import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

heartbeat = pytest.importorskip("raygrec.cluster.heartbeat", reason="Ray is not installed")
psutil = pytest.importorskip("psutil")

BEAT = heartbeat.Beat(1, 0, ("training", 7), "save (folder.py:1)", waits=False, node="n", pid=1)
WAITING = replace(BEAT, rank=1, inside="sum_over_ranks (engine.py:1)", waits=True)


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_pulse_tells_when_a_rank_was_heard_and_when_it_moved():
    clock = Time()
    pulses = heartbeat.Pulses(clock)
    pulses.beat(BEAT)
    pulses.beat(WAITING)
    clock.now = 3.0
    pulses.beat(replace(BEAT, inside="elsewhere"))
    pulses.beat(replace(WAITING, at=("training", 8)))
    clock.now = 5.0
    assert [(pulse.heard, pulse.still) for pulse in pulses.pulses()] == [(2.0, 5.0), (2.0, 2.0)]
    pulses.ended(1, 0)
    assert [pulse.beat.rank for pulse in pulses.pulses()] == [1]


def test_a_new_group_takes_the_place_of_the_one_before():
    pulses = heartbeat.Pulses(Time())
    pulses.beat(WAITING)
    pulses.beat(replace(BEAT, group=2))
    pulses.beat(WAITING)  # late
    pulses.ended(1, 0)
    assert [pulse.beat.group for pulse in pulses.pulses()] == [2]


def pulse(beat: object, heard: float, still: float) -> object:
    return heartbeat.Pulse(beat, heard, still)


@pytest.mark.parametrize(
    ("pulses", "ranks"),
    [
        ([pulse(BEAT, 1, 11), pulse(WAITING, 1, 11)], [0]),  # in no collective, while the other is
        ([pulse(BEAT, 1, 11), pulse(WAITING, 9, 11)], [1]),  # not heard any more, wherever it was
        ([pulse(BEAT, 1, 11), pulse(WAITING, 1, 9)], []),  # the other still moves
        ([pulse(BEAT, 99, 99), pulse(WAITING, 99, 99)], []),  # a group that is gone
        ([pulse(WAITING, 1, 11), pulse(replace(WAITING, rank=2), 1, 11)], [1, 2]),  # nobody knows
        ([], []),
    ],
)
def test_who_the_others_wait_for(pulses, ranks):
    assert [one.beat.rank for one in heartbeat.stalled(pulses, 10.0)] == ranks


def test_the_line_names_rank_step_and_place():
    pulses = [pulse(BEAT, 1, 601), pulse(WAITING, 400, 602)]
    assert heartbeat.described(pulses[:1], pulses) == (
        "no worker has moved for 601 s: rank 0 stands at step 7 of training and is in save (folder.py:1); "
        "the others wait"
    )
    assert "rank 1 stands at step 7 of training and was last heard of 400 s ago" in heartbeat.described(
        pulses[1:], pulses
    )


def test_where_a_thread_stands():
    from raygrec.train.lock import held

    def frame(file: str, back: object) -> object:
        code = SimpleNamespace(co_filename=file, co_name="all_reduce")
        return SimpleNamespace(f_code=code, f_back=back, f_lineno=5)

    ours = frame(held.__wrapped__.__code__.co_filename, None)
    assert heartbeat.standing(ours) == ("all_reduce (lock.py:5)", False)
    assert heartbeat.standing(frame("/x/torch/functional.py", ours)) == ("all_reduce (lock.py:5)", False)
    assert heartbeat.standing(frame("/x/torch/distributed/c10d.py", ours)) == ("all_reduce (lock.py:5)", True)
    assert heartbeat.standing(None) == ("", False)


@pytest.fixture
def watched(monkeypatch):
    """A watch of ten seconds over pulses that a test sets, its lines and whom it has killed."""
    seen = SimpleNamespace(pulses=[], lines=[], killed=[])
    clock = Time()
    monkeypatch.setattr(heartbeat.time, "monotonic", clock)
    monkeypatch.setattr(heartbeat.ray, "get", lambda pulses, timeout: pulses)
    monkeypatch.setattr(heartbeat, "_end", lambda beat: seen.killed.append(beat.rank))
    board = SimpleNamespace(pulses=SimpleNamespace(remote=lambda: seen.pulses))
    seen.watch = heartbeat.Watch(board, 10.0, seen.lines.append)

    def look(*pulses: object) -> None:
        clock.now += 5.0
        seen.pulses = list(pulses)
        seen.watch.look()

    seen.look = look
    return seen


def test_a_stall_is_said_once_and_ended_after_as_long_again(watched):
    for still in (5, 11, 16, 21, 26):
        watched.look(pulse(BEAT, 1, still), pulse(WAITING, 1, still))
    assert len(watched.lines) == 2
    assert watched.lines[0].startswith("no worker has moved for 11 s: rank 0 ")
    assert watched.lines[1] == "rank 0 is ended, so that the workers start again"
    assert watched.killed == [0]
    assert watched.watch.line.startswith("no worker has moved for 21 s: rank 0 ")
    watched.look(pulse(replace(BEAT, group=2), 1, 1))
    assert watched.watch.line == ""


def test_a_second_stall_is_said_too(watched):
    for still in (11, 2, 11):
        watched.look(pulse(BEAT, 1, still), pulse(WAITING, 1, still))
    assert len(watched.lines) == 2
    assert watched.killed == []


def test_a_start_that_takes_long_is_said_and_not_ended(watched):
    for still in (11, 30):
        watched.look(*(pulse(replace(beat, at=heartbeat.STARTING_UP), 1, still) for beat in (BEAT, WAITING)))
    assert len(watched.lines) == 1
    assert "rank 0 stands at its start-up" in watched.lines[0]
    assert watched.killed == []


def test_only_a_worker_is_killed():
    program = [sys.executable, "-c", "print(flush=True); input()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(program, **pipes) as other, subprocess.Popen([*program, "RayTrainWorker"], **pipes) as worker:
        for process in (other, worker):
            process.stdout.readline()  # it runs, under its own name
            heartbeat.kill_worker(process.pid)
        assert worker.wait(10) == -signal.SIGKILL
        other.communicate(b"\n")
    assert other.returncode == 0
