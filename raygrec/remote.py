"""Folders at addresses such as s3://bucket/folder: fetched once per machine and version, copied up when finished."""

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from raygrec.errors import InputError

SCHEMES = ("s3", "gs", "file")
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")  # one slash is what pathlib leaves of two


def is_address(place: object) -> bool:
    """Whether `place` is an address rather than a path."""
    return _ADDRESS.match(str(place)) is not None


def checked(address: str) -> str:
    """`address` itself; `InputError` where its scheme is none that we read."""
    scheme = address.partition("://")[0]
    if "://" not in address or scheme not in SCHEMES:
        known = ", ".join(f"{one}://" for one in SCHEMES)
        raise InputError(f"{address}: addresses begin with one of {known}")
    return address


def refuse_address(place: object, instead: str) -> None:
    """`InputError` where `place` is an address and only a path will do."""
    if is_address(place):
        raise InputError(f"{place}: an address is no good here; {instead}")


def fetch(address: str, needed: str, check: Callable[[Path], None] | None = None) -> Path:
    """The folder at `address` as a local one, under RAYGREC_CACHE (~/.cache/raygrec).

    A version, by the names, sizes and times of its files, is fetched once: of several processes one does it, and the
    others wait. `needed` is the file without which the folder is not complete; `check` looks at the copy before it
    counts. Raises `InputError` where the folder cannot be read, is incomplete or does not pass `check`.
    """
    from filelock import FileLock

    try:
        system, root = _filesystem(address)
        files = _listing(system, root)
        if needed not in files:
            raise InputError(f"{address}: {needed} is missing; it is nothing finished, or not the right address")
        name = Path(root).name or "root"
        version = hashlib.sha256(f"{address} {sorted(files.items())}".encode()).hexdigest()[:16]
        cache = Path(os.environ.get("RAYGREC_CACHE") or Path.home() / ".cache" / "raygrec")
        place, draft = cache / f"{name}-{version}", cache / f".{name}-{version}.draft"
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{name}-{version}.lock"):
            if not place.exists():
                shutil.rmtree(draft, ignore_errors=True)
                _copy_down(Place(address), files, draft)
                if check:
                    check(draft)
                draft.rename(place)
    except (OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"{address}: cannot be fetched ({one_line(error)})") from None
    return place


def upload(folder: Path, address: str, last: str, without: tuple[str, ...] = ()) -> None:
    """Copies `folder` to `address`, the file `last` after all others; `without` names what stays, at the top.

    Raises `RuntimeError` where it cannot be written.
    """

    def wanted(path: Path) -> bool:
        parts = path.relative_to(folder).parts
        return path.is_file() and parts[0] not in without and not any(part.startswith(".") for part in parts)

    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if wanted(path))
    try:
        there = Place(address)
        for name in [*(name for name in names if name != last), last]:
            there.put(folder / name, name)
    except (OSError, ValueError, NotImplementedError) as error:
        raise RuntimeError(f"{folder} is finished, but could not be copied to {address} ({one_line(error)})") from None


class Place:
    """The folder at an address, file by file; what cannot be done is an OSError, ValueError or NotImplementedError."""

    def __init__(self, address: str) -> None:
        self._system, self._root = _filesystem(address)

    def files(self) -> dict[str, int]:
        """The size of each file, by its name in the folder; none where there is no folder."""
        return {name: size for name, (size, _) in _listing(self._system, self._root, missing=True).items()}

    def put(self, file: Path, name: str) -> None:
        """Copies a file there."""
        from pyarrow import fs

        target = f"{self._root}/{name}"
        if self._system.type_name == "local":
            self._system.create_dir(os.path.dirname(target), recursive=True)
        fs.copy_files(str(file), target, fs.LocalFileSystem(), self._system)

    def get(self, name: str, folder: Path, size: int) -> None:
        """Copies a file from there to the same name in `folder`, and looks that it comes whole."""
        from pyarrow import fs

        target = folder / name
        if not target.resolve().is_relative_to(folder.resolve()):
            raise OSError(f"'{name}' points out of the folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        fs.copy_files(f"{self._root}/{name}", str(target), self._system, fs.LocalFileSystem())
        if target.stat().st_size != size:
            raise OSError(f"'{name}' came with {target.stat().st_size} of {size} bytes")

    def remove(self, name: str) -> None:
        """Removes a folder of it, with all in it, where there is one."""
        from pyarrow import fs

        path = f"{self._root}/{name}"
        if self._system.get_file_info(path).type == fs.FileType.Directory:
            self._system.delete_dir(path)


def _filesystem(address: str) -> tuple:
    from pyarrow import fs

    system, root = fs.FileSystem.from_uri(checked(address))
    return system, root.rstrip("/")


def _listing(system, root: str, missing: bool = False) -> dict[str, tuple[int, int | None]]:  # noqa: ANN001
    from pyarrow import fs

    entries = system.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=missing))
    files = (entry for entry in entries if entry.type == fs.FileType.File)
    return {os.path.relpath(entry.path, root): (entry.size, entry.mtime_ns) for entry in files}


def _copy_down(place: Place, files: dict[str, tuple[int, int | None]], draft: Path) -> None:
    for name, (size, _) in files.items():
        place.get(name, draft, size)


def one_line(error: BaseException) -> str:
    """An error of a file system, as the end of a sentence."""
    return " ".join(str(error).split())[:300]
