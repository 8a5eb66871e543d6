"""Writing so that a file is there whole or not at all, also after a crash of the machine or on a full disk."""

import errno
import os
import platform
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from raygrec.errors import StorageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replaced(file: Path, needed: int | None = None) -> Iterator[Path]:
    """A draft beside `file` to write, which takes its place, durably, once the block has ended well.

    Otherwise the draft is gone and `file` is as before. It can be read by whom any new file can, whoever writes the
    draft: safetensors closes its own to others. Raises as `writing`.
    """
    # Several processes, on several machines, may write a file at once: each writes a draft of its own.
    draft = file.with_name(f".{file.name}.{platform.node()}-{os.getpid()}.draft")
    with writing(file, needed):
        try:
            draft.unlink(missing_ok=True)  # what lies there may be a link to somewhere else
            mode = mode_of_new(draft)
            yield draft
            draft.chmod(mode)
            sync(draft)
            os.replace(draft, file)
            sync(file.parent)
        finally:
            draft.unlink(missing_ok=True)


def write_whole(file: Path, content: str | bytes) -> None:
    """Gives `file` this content, text in UTF-8, as `replaced` does."""
    raw = content.encode("utf-8") if isinstance(content, str) else content
    with replaced(file, len(raw)) as draft:
        draft.write_bytes(raw)


def made_once(place: Path, make: Callable[[], None], sign: Path | None = None) -> None:
    """Calls `make` where `place` is not there; of several processes that want it at once, one makes it.

    sign: what is there once `place` is whole; by default `place` itself.
    """
    sign = sign or place
    if sign.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(f".{place.name}.lock")):
        if not sign.exists():
            make()


@contextmanager
def gone_if_it_fails(folder: Path, new: bool) -> Iterator[None]:
    """Where the block fails, a `new` folder is removed, with all in it."""
    try:
        yield
    except BaseException:
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def writing(place: Path, needed: int | None = None) -> Iterator[None]:
    """`StorageError` where the block meets a full disk, a quota or a limit; needed: bytes, for its message."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _errno(error)
        if number not in FULL:
            raise
        wanted = "" if needed is None else f"{needed / 2**20:.2f} MiB needed, "
        left = shutil.disk_usage(_existing(place)).free / 2**20
        raise StorageError(
            f"{place}: cannot be written: {os.strerror(number)} ({wanted}{left:.2f} MiB left on its disk)"
        ) from None


def mode_of_new(file: Path) -> int:
    """The permissions that a new file gets by the umask; `file` is made for it, and is gone again."""
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    file.unlink()
    return mode


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _errno(error: OSError | SafetensorError) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))  # of its writer, which is not Python
    return int(found[1]) if found else None


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)
