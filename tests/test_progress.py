"""Bars on a real (pseudo) terminal, and lines where there is none."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from raygrec.progress import _rate, clock, progress_bar, track

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")

ONE_BAR = """
import time
from raygrec.progress import progress_bar
with progress_bar() as bars:
    task = bars.add_task("reading of the reviews of Beauty.gz", total=123456, note="loss 6.1234 N@10 0.0512")
    for _ in range(8):
        time.sleep(0.1)
        bars.advance(task, 1000)
"""

NESTED = """
import time
from raygrec.progress import progress_bar, track
with progress_bar() as bars:
    task = bars.add_task("LightGCN epochs", total=2)
    for _ in range(2):
        for _ in track(range(5), "ranking"):
            time.sleep(0.08)
        bars.advance(task)
for _ in track(range(3), "afterwards"):
    break
print('{"result": 1}')
"""


@pytest.fixture
def seconds(monkeypatch):
    """The time, which moves only when a test adds to it; bars and lines are wanted."""
    now = [0.0]
    monkeypatch.setattr("raygrec.progress.monotonic", lambda: now[0])
    monkeypatch.delenv("RAYGREC_QUIET", raising=False)
    return now


def on_terminal(script: str, columns: int) -> tuple[int, str, str]:
    """Runs `script`, its standard error a terminal: (exit code, what it showed, standard output)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    hidden = ("COLUMNS", "LINES", "RAYGREC_QUIET", "NO_COLOR", "FORCE_COLOR")
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | {"TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux's way to say that the other side is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    output, _ = process.communicate(timeout=20)
    return process.returncode, shown.decode(), output.decode()


def lines(shown: str) -> list[str]:
    return [line.rstrip() for line in re.split(r"[\r\n]+", ESCAPES.sub("", shown)) if line.strip()]


@pytest.mark.parametrize("columns", [80, 120])
def test_rate_and_time_left_are_whole(columns):
    code, shown, _ = on_terminal(ONE_BAR, columns)
    frames = [line for line in lines(shown) if "━" in line and "/s" in line]
    assert code == 0
    assert frames
    for frame in frames:
        assert len(frame) <= columns
        assert re.search(r" [\d,]+/123,456 +[\d,.]+/s +.*\d\d:\d\d left", frame), frame
    assert ("so far" in frames[-1]) == (columns >= 100)


def test_a_bar_inside_a_bar_shows_both():
    code, shown, output = on_terminal(NESTED, 80)
    text = "\n".join(lines(shown))
    assert code == 0, text
    assert re.search(r"LightGCN epochs .*\nranking ", text)
    assert "Traceback" not in text
    assert output == '{"result": 1}\n'  # a result for a pipe does not end among the bars
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")  # the cursor is back


def test_no_terminal_one_line_for_a_task_that_took_long(capsys, seconds):
    for _ in track(range(44), "ranking"):
        seconds[0] += 2.9 / 44
    assert capsys.readouterr().err == "ranking: 44/44 in 2.9 s, 15.2/s\n"
    assert list(track(range(3), "short")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_no_terminal_a_long_task_tells_once_how_fast_it_is(capsys, seconds):
    with progress_bar() as bars:
        task = bars.add_task("epochs", total=100)
        for step in range(1, 51):
            seconds[0] += 2
            bars.update(task, completed=step, note=f"loss {1 / step:.2f}")
    told, ended = capsys.readouterr().err.splitlines()
    assert told == "epochs: 5/100 so far, 0.50/s, 03:10 left, loss 0.20"
    assert ended == "epochs: 50/100 in 01:40, 0.50/s, loss 0.02"


def test_steps_done_before_a_resumed_task_do_not_count_as_fast(capsys, seconds):
    with progress_bar() as bars:
        task = bars.add_task("alignment", total=500)
        for step in range(400, 501):
            bars.update(task, completed=step)
            seconds[0] += 0.5
        bars.update(task, note="loss 0.5")  # a finished task may still get its last note
        assert capsys.readouterr().err.splitlines()[0].startswith("alignment: 420/500 so far, 2.00/s, 00:40 left")
    assert capsys.readouterr().err == "alignment: 500/500 in 50.0 s, 2.00/s, loss 0.5\n"


def test_a_finished_task_leaves_when_another_moves(capsys, seconds):
    with progress_bar() as bars:
        training = bars.add_task("training", total=100)
        validation = bars.add_task("validation", total=1)
        seconds[0] += 4
        bars.advance(validation)
        bars.advance(training)
        bars.advance(training)
        assert capsys.readouterr().err == "validation: 1/1 in 4.0 s, 0.25/s\n"


def test_quiet_says_nothing(capsys, seconds, monkeypatch):
    monkeypatch.setenv("RAYGREC_QUIET", "1")
    for _ in track(range(5), "ranking"):
        seconds[0] += 9
    assert capsys.readouterr().err == ""


def test_a_generator_has_no_total(capsys, seconds):
    for _ in track((n for n in range(10)), "reading"):
        seconds[0] += 0.5
    assert capsys.readouterr().err == "reading: 10 in 5.0 s, 2.00/s\n"


def test_figures():
    assert [_rate(speed) for speed in (0.034, 1.234, 15.2, 408.6, 12345.0)] == [
        "0.034/s",
        "1.23/s",
        "15.2/s",
        "408.6/s",
        "12,345/s",
    ]
    assert [clock(seconds) for seconds in (None, 7, 75, 3725)] == ["--:--", "00:07", "01:15", "1:02:05"]
