"""A lock that one process holds, and that goes with it however it ends."""

import errno
import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raygrec.errors import InputError
from raygrec.progress import tell

BETWEEN = 0.2  # seconds between two tries
BUSY = (errno.EWOULDBLOCK, errno.EACCES)


@contextmanager
def held(file: Path, wait: float = 0.0) -> Iterator[None]:
    """Holds `file` while the block runs; `InputError` names who holds it after `wait` seconds still.

    The kernel keeps the lock (flock) and drops it when the process ends, also by kill -9. Between machines it
    holds as far as their shared file system passes locks on: NFS 4 does, and NFS mounted with `nolock` or
    `local_lock`, Lustre without `flock` and most object stores do not. Where there are no locks at all, that is said.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        _take(descriptor, file, time.monotonic() + wait)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked process may still have it open
        os.close(descriptor)


def _take(descriptor: int, file: Path, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in BUSY:
                tell(f"{file}: no locks on this file system ({error.strerror}); start no second run in its folder")
                return None
        if time.monotonic() >= deadline:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            raise InputError(f"{file.parent}: {owner} is at work there; wait for its end, or name another out")
        time.sleep(BETWEEN)
