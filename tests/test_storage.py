import errno
import os
import re
import resource
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from raygrec.errors import StorageError
from raygrec.storage import made_once, replaced, writing
from raygrec.tensors import load_tensors, save_tensors


@contextmanager
def file_limit(size: int):
    """No file may grow beyond `size` bytes, as under a quota: the kernel refuses the write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def umask(mask: int):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_files_have_the_permissions_that_the_umask_gives(tmp_path, mask, mode):
    with umask(mask):
        save_tensors(tmp_path / "tensors", {"w": torch.ones(2)})
        with replaced(tmp_path / "text") as draft:
            draft.write_text("1")
    assert modes(tmp_path) == {"tensors": mode, "text": mode}


def test_a_file_is_replaced_only_as_a_whole(tmp_path):
    file = tmp_path / "a.json"
    with replaced(file) as draft:
        draft.write_text("first")
        assert not file.exists()
    with pytest.raises(KeyError), replaced(file) as draft:
        draft.write_text("second")
        raise KeyError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "first")]


def test_of_several_that_want_a_file_one_makes_it(tmp_path):
    file, made = tmp_path / "there" / "file", []

    def want(number: int) -> None:
        def make() -> None:
            made.append(number)
            time.sleep(0.1)
            file.write_text(str(number))

        made_once(file, make)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(want, range(8)))
    assert [file.read_text()] == [str(number) for number in made]


def test_a_draft_is_not_written_through_a_link(tmp_path):
    file, victim = tmp_path / "a.json", tmp_path / "victim"
    victim.write_text("mine")
    with replaced(file) as draft:
        name = draft
        draft.write_text("1")
    name.symlink_to(victim)
    with replaced(file) as draft:
        draft.write_text("2")
    assert victim.read_text() == "mine"
    assert file.read_text() == "2"


def test_a_write_that_does_not_fit_leaves_what_was_there(tmp_path):
    file = tmp_path / "a.safetensors"
    small, large = {"w": torch.ones(8)}, {"w": torch.zeros(2**18)}
    save_tensors(file, small)
    expected = r"a\.safetensors: cannot be written: File too large \(1\.00 MiB needed, [\d.]+ MiB left on its disk\)$"
    with pytest.raises(StorageError, match=expected), file_limit(2**16):
        save_tensors(file, large)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert torch.equal(load_tensors(file)["w"], small["w"])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_with_what_is_left(tmp_path, number):
    with (
        pytest.raises(StorageError, match=re.escape(os.strerror(number)) + r" \([\d.]+ MiB left on its disk\)$"),
        writing(tmp_path / "not" / "there"),
    ):
        raise OSError(number, "")


def test_other_failures_stay_as_they_are(tmp_path):
    with pytest.raises(OSError, match="stale"), writing(tmp_path):
        raise OSError(errno.ESTALE, "stale")
