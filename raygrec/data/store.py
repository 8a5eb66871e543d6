"""The store: a folder of memory-mapped arrays, and a manifest that says where they come from."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from raygrec.data import files
from raygrec.data.arrays import CSR, Strings
from raygrec.data.splits import SPLITS
from raygrec.data.tokens import TokenTable
from raygrec.errors import InputError
from raygrec.remote import fetch, is_address
from raygrec.storage import write_whole

FORMAT = "raygrec-store"
VERSION = 1
MANIFEST = "manifest.json"

# Everything a store holds. A name in a manifest that is not in here is refused, so none can point outside.
_CSRS = ("train_by_user", "train_by_item", "valid_by_user", "test_by_user", "terms")
_STRINGS = ("user_ids", "item_ids", "titles", "texts", "term_names")
_TIMES = ("train_times", "valid_times")
_DTYPES = {
    **{name: np.dtype(np.int64) for name in _TIMES},
    **{f"{name}.indptr": np.dtype(np.int64) for name in (*_CSRS, *_STRINGS)},
    **{f"{name}.indices": np.dtype(np.int32) for name in _CSRS},
    **{f"{name}.data": np.dtype(np.uint8) for name in _STRINGS},
}


class Store:
    """Interactions, ids and item texts of one data set, read from disk as they are needed.

    Users are 0..U-1 and items 0..I-1. Pickling a store pickles its path, so that workers open it themselves.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.name: str = manifest["name"]
        self.num_users: int = manifest["num_users"]
        self.num_items: int = manifest["num_items"]
        self.ordered: bool = manifest["ordered"]
        self.fingerprint: str = manifest["fingerprint"]

    @staticmethod
    def open(path: Path | str) -> "Store":
        """Opens a store after checking its manifest and array sizes; `InputError` names what is wrong.

        One at an address is fetched first, and its copy checked against the manifest's SHA-256.
        """
        if is_address(path):
            return Store.open(fetch(str(path), MANIFEST, lambda copy: Store.open(copy).verify()))
        path = Path(path)
        manifest = _read_manifest(path)
        for name, entry in manifest["arrays"].items():
            file = path / f"{name}.npy"
            size = file.stat().st_size if file.is_file() else None
            if size != entry["size"]:
                found = "is missing" if size is None else f"has {size} bytes, the manifest says {entry['size']}"
                raise InputError(f"{file}: {found}; prepare the store again")
        return Store(path, manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        return Store.open, (self.path,)

    def kept_by(self, folder: Path) -> None:
        """Notes its fingerprint in the folder of a run or sweep; `InputError` where that was started with another."""
        file = folder / "store.id"
        if not file.exists():
            write_whole(file, self.fingerprint)
        if file.read_text(encoding="utf-8") != self.fingerprint:
            raise InputError(
                f"{self.path}: not the store that {folder} was started with (its fingerprint differs); "
                "put that one back, or name another out"
            )

    def verify(self) -> None:
        """Compares the SHA-256 of every array with the manifest; `InputError` names one that differs."""
        for name, entry in self.manifest["arrays"].items():
            file = self.path / f"{name}.npy"
            if files.sha256(file) != entry["sha256"]:
                raise InputError(f"{file}: its content is not what was written (SHA-256); prepare the store again")

    def interactions(self, split: str, by: str = "user") -> CSR:
        """The interactions of `split`, "train", "valid" or "test".

        by "user": [U] rows of item numbers in time order. by "item": [I] rows of user numbers, ascending.
        """
        if split not in SPLITS or by not in ("user", "item"):
            raise ValueError(f"no interactions '{split}' by '{by}': splits are {SPLITS}, by is 'user' or 'item'")
        if by == "item" and split != "train":
            return self._csr(f"{split}_by_user").transposed(self.num_items)
        return self._csr(f"{split}_by_{by}")

    def times(self, split: str) -> np.ndarray:
        """[entries] int64: when each entry of `interactions(split)`, "train" or "valid", was, in the source's unit.

        `InputError` where the split is not one in time: other stores do not keep them.
        """
        if f"{split}_times" not in self.manifest["arrays"]:
            raise InputError(f"{self.path}: keeps no times; prepare with split=global-time")
        return self._array(f"{split}_times")

    @cached_property
    def user_ids(self) -> Strings:
        """The users' ids in the source."""
        return self._strings("user_ids")

    @cached_property
    def item_ids(self) -> Strings:
        """The items' ids in the source."""
        return self._strings("item_ids")

    @cached_property
    def titles(self) -> Strings:
        """One title per item; the item's id where the source has none."""
        return self._strings("titles")

    @cached_property
    def texts(self) -> Strings:
        """One text per item: the text template filled in."""
        return self._strings("texts")

    @cached_property
    def terms(self) -> CSR:
        """Per item the numbers of its terms: category names from leaf to root, then title words."""
        return self._csr("terms")

    @cached_property
    def term_names(self) -> Strings:
        """The vocabulary of `terms`."""
        return self._strings("term_names")

    def tokens(self, tokenizer: str, max_length: int = 64) -> TokenTable:
        """Token ids of texts, titles and term names, without special tokens; made once and kept in the store.

        tokenizer: a folder in Hugging Face's layout, or a hub id. max_length: tokens per row at most.
        """
        return TokenTable.load_or_make(
            self.path / "tokens", tokenizer, max_length, self.texts, self.titles, self.term_names
        )

    def _csr(self, name: str) -> CSR:
        return CSR(self._array(f"{name}.indptr"), self._array(f"{name}.indices"))

    def _strings(self, name: str) -> Strings:
        return Strings(self._array(f"{name}.indptr"), self._array(f"{name}.data"))

    def _array(self, name: str) -> np.ndarray:
        file = self.path / f"{name}.npy"
        try:
            array = np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: not a readable array ({error}); prepare the store again") from None
        if array.dtype != _DTYPES[name] or array.ndim != 1:
            raise InputError(f"{file}: expected a row of {_DTYPES[name]}, found {array.dtype} {array.shape}")
        return array


class StoreWriter:
    """Writes arrays into a folder that becomes a store once it is complete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._arrays: dict[str, dict[str, Any]] = {}

    def write_csr(self, name: str, rows: CSR) -> None:
        self._write(f"{name}.indptr", rows.indptr)
        self._write(f"{name}.indices", rows.indices)

    def write_strings(self, name: str, strings: Strings) -> None:
        self._write(f"{name}.indptr", strings.indptr)
        self._write(f"{name}.data", strings.data)

    def write_times(self, name: str, times: np.ndarray) -> None:
        self._write(name, times)

    def finish(self, facts: dict[str, Any]) -> Store:
        """Writes the manifest, last of all: `facts` (name, counts, …), arrays, and the fingerprint."""
        digests = "".join(f"{name} {entry['sha256']}\n" for name, entry in sorted(self._arrays.items()))
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            **facts,
            "fingerprint": hashlib.sha256(digests.encode()).hexdigest(),
            "arrays": self._arrays,
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False)
        (self.folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
        return Store.open(self.folder)

    def _write(self, name: str, array: np.ndarray) -> None:
        file = self.folder / f"{name}.npy"
        np.save(file, array.astype(_DTYPES[name], copy=False), allow_pickle=False)
        self._arrays[name] = {"size": file.stat().st_size, "sha256": files.sha256(file)}


def check_output(out: Path, overwrite: bool) -> None:
    """`InputError` unless nothing is at `out`, or a store that may be overwritten."""
    if not out.exists() and not out.is_symlink():
        return
    if not _is_store(out):
        raise InputError(f"{out}: exists and is not a raygrec store; name a folder that does not exist yet")
    if not overwrite:
        raise InputError(f"{out}: a store exists there; set overwrite to replace it")


@contextmanager
def new_store(out: Path, overwrite: bool = False) -> Iterator[StoreWriter]:
    """A writer whose folder takes the place of `out` when the block ends well, and vanishes otherwise."""
    out = out.resolve()  # a link stays, and what it points to is replaced
    check_output(out, overwrite)
    new_parents = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Of this call alone, and closed to others; the draft inside has the permissions that any folder would get.
        with TemporaryDirectory(prefix=f".{out.name}.draft-", dir=out.parent, ignore_cleanup_errors=True) as place:
            draft, old = Path(place, "new"), Path(place, "old")
            draft.mkdir()
            try:
                yield StoreWriter(draft)
                check_output(out, overwrite)
                if out.exists():
                    out.rename(old)
                draft.rename(out)
            finally:
                if old.exists() and not out.exists():
                    old.rename(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error})") from None
    finally:
        with suppress(OSError):  # the first that holds something ends this, and it is `out` if all went well
            for folder in new_parents:
                folder.rmdir()


def _is_store(path: Path) -> bool:
    try:
        return json.loads((path / MANIFEST).read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        raise InputError(f"{path}: no store there ({MANIFEST} is missing); make one with `raygrec prepare`")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not a readable manifest ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{file}: not the manifest of a raygrec store")
    if manifest.get("version") != VERSION:
        found = manifest.get("version")
        raise InputError(f"{file}: version {found}, this raygrec reads version {VERSION}; prepare the store again")
    _check_manifest(file, manifest)
    return manifest


def _check_manifest(file: Path, manifest: dict[str, Any]) -> None:
    kinds = {
        "name": str,
        "num_users": int,
        "num_items": int,
        "ordered": bool,
        "fingerprint": str,
        "arrays": dict,
    }
    for key, kind in kinds.items():
        if not isinstance(manifest.get(key), kind):
            raise InputError(f"{file}: key '{key}' is missing or no {kind.__name__}")
    wrong = (manifest["arrays"].keys() ^ _DTYPES.keys()) - (set(_TIMES) - manifest["arrays"].keys())
    if wrong:
        raise InputError(f"{file}: array '{min(wrong)}' is unknown or missing; prepare the store again")
    for name, entry in manifest["arrays"].items():
        if not isinstance(entry, dict) or not isinstance(entry.get("size"), int) or "sha256" not in entry:
            raise InputError(f"{file}: array '{name}' lacks its size or sha256")
