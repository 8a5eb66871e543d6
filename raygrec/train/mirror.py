"""A run's checkpoints at an address: copied there behind the loop's back, and fetched where the run folder is lost."""

import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from raygrec.errors import InputError
from raygrec.progress import tell
from raygrec.remote import Place, one_line
from raygrec.train import manifest
from raygrec.train.folder import KEEP, METRICS, STEP_DIGITS, RunFolder
from raygrec.train.settings import RunConfig

FOLDER = "checkpoints"
_CHECKPOINT = re.compile(rf"{FOLDER}/(?P<name>(?P<stage>\w+)-[0-9]{{{STEP_DIGITS}}})/(?P<file>.+)")


class Mirror:
    """Rank 0's copy of a run, for as long as the block runs; at the block's end what is in flight is complete.

    One thread copies the newest checkpoint there is, and leaves out those that were complete while it copied another.
    A failure is told once for each kind of it.
    """

    def __init__(self, folder: RunFolder, address: str, warn: Callable[[str], None] = tell) -> None:
        self._folder, self._address, self._warn = folder, address, warn
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mirror")
        self._waiting: Future[None] | None = None
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of what is there, and may change here
        self._failures: set[str] = set()

    def ask(self, checkpoint: str) -> None:
        """Copies checkpoints/<checkpoint>, which is complete, as soon as the one that is being copied is."""
        if self._waiting is not None:
            self._waiting.cancel()  # nothing happens if it has begun
        self._waiting = self._thread.submit(self._try, checkpoint)

    def _try(self, checkpoint: str) -> None:
        place = self._folder.checkpoints / checkpoint
        try:
            self._copy(place)
        except Exception as error:
            if not place.exists():
                return  # a newer one has taken its place, and will be copied
            kind = f"{type(error).__name__} {getattr(error, 'errno', None)}"
            if kind not in self._failures:
                self._failures.add(kind)
                self._warn(
                    f"{self._address}: {checkpoint} could not be copied there ({one_line(error)}); "
                    "the run goes on, and tries again with the next one"
                )

    def _copy(self, place: Path) -> None:
        there = Place(self._address)
        for file in (*self._folder.path.iterdir(), *self._folder.checkpoints.iterdir()):
            name = file.relative_to(self._folder.path).as_posix()
            # metrics.json says that all is there, which is for the end of the run to say.
            if file.is_file() and not file.name.startswith(".") and file.name != METRICS:
                seen = file.stat()
                if self._sent.get(name) != (seen.st_size, seen.st_mtime_ns):
                    there.put(file, name)
                    self._sent[name] = (seen.st_size, seen.st_mtime_ns)
        name = f"{FOLDER}/{place.name}"
        there.remove(name)  # of a run that was here before, and has come to the same step again
        files = sorted(place.iterdir(), key=lambda file: file.name == manifest.NAME)  # last
        for file in files:
            there.put(file, f"{name}/{file.name}")
        complete = _complete(there.files())[place.name.rpartition("-")[0]]
        newest = complete.index(place.name) + 1  # later ones are of a try before this one
        for other in (*complete[: max(newest - KEEP, 0)], *complete[newest:]):
            there.remove(f"{FOLDER}/{other}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()  # waits


def restore(config: RunConfig, folder: RunFolder, resume: bool) -> None:
    """Fetches the run at `config.upload` where its folder is not there, with the newest whole checkpoint of each stage.

    Where the address holds no run, or the folder is there, nothing happens. Raises `InputError` where the run cannot
    be read, and for a new run at an address that has one: their checkpoints would mix.
    """
    if not config.upload_checkpoints or folder.config_file.exists():
        return
    draft = folder.path.with_name(f".{folder.path.name}.fetched")
    try:
        there = Place(config.upload)
        files = there.files()
        if folder.config_file.name not in files:
            return
        if not resume:
            raise InputError(
                f"{config.upload}: holds a run already; pass --resume to fetch it and go on, or name another upload"
            )
        _fetch(there, files, draft)
        if folder.path.exists():
            folder.path.rmdir()
        draft.rename(folder.path)
    except (OSError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"{config.upload}: cannot be read, or not fetched to {folder.path} ({one_line(error)})"
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    tell(f"{folder.path}: fetched from {config.upload}")


def _fetch(there: Place, files: dict[str, int], draft: Path) -> None:
    shutil.rmtree(draft, ignore_errors=True)
    for name, size in files.items():
        if not _CHECKPOINT.fullmatch(name):
            there.get(name, draft, size)
    for names in _complete(files).values():
        _fetch_newest(there, files, names, draft)


def _fetch_newest(there: Place, files: dict[str, int], names: list[str], draft: Path) -> None:
    for checkpoint in reversed(names):
        place = draft / FOLDER / checkpoint
        for name, size in files.items():
            if name.startswith(f"{FOLDER}/{checkpoint}/"):
                there.get(name, draft, size)
        try:
            return manifest.check(place)
        except InputError as error:
            tell(f"{error}; this checkpoint is left out")
            shutil.rmtree(place)


def _complete(files: dict[str, int]) -> dict[str, list[str]]:
    """Names of the checkpoints that have a manifest, by stage, the oldest first."""
    found: dict[str, list[str]] = {}
    for name in sorted(files):
        match = _CHECKPOINT.fullmatch(name)
        if match and match["file"] == manifest.NAME:
            found.setdefault(match["stage"], []).append(match["name"])
    return found
