import subprocess
import sys

import pytest

board = pytest.importorskip("raygrec.cluster.board", reason="Ray is not installed")


def test_the_board_keeps_the_last_word_of_each_task():
    mine = board.Board()
    mine.tell("a", 1, 3, "")
    mine.tell("a", 3, 3, "x")
    mine.tell("a", 1, 3, "again")
    mine.tell("b", 1, 2, "")
    mine.tell("b", 2, 2, "")
    assert mine.take() == [("a", 3, 3, "x"), ("a", 1, 3, "again"), ("b", 2, 2, "")]
    assert mine.take() == []


@pytest.mark.cluster
def test_the_board_comes_back_where_the_driver_is(local_ray):
    """Workers ask it before they begin: without it, no restart of theirs would help."""
    import ray

    mine = board.put_up_board()
    assert ray.get(mine.failed.remote()) is None
    ray.kill(mine, no_restart=False)
    assert ray.get(mine.failed.remote(), timeout=60) is None
    place = ray.get(mine.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()))
    assert place == ray.get_runtime_context().get_node_id()
    ray.kill(mine)


def test_the_board_keeps_the_first_failure():
    mine = board.Board()
    assert mine.failed() is None
    first = board.Failure(wrong_input=True, message="first", trace="")
    mine.fail(first)
    mine.fail(board.Failure(wrong_input=False, message="second", trace=""))
    assert mine.failed() == first


@pytest.mark.parametrize(("module", "other"), [("board", "ray.train"), ("introduction", "torch")])
def test_what_a_board_and_a_controller_do_not_need(module, other):
    """Their processes start in a fraction of the time."""
    code = f"import sys, raygrec.cluster.{module}; sys.exit('{other}' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
