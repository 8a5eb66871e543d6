"""Item texts as token ids, made once per tokenizer and kept beside the store's arrays."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from raygrec.data.arrays import CSR, Strings
from raygrec.errors import InputError
from raygrec.progress import track
from raygrec.storage import made_once

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
_BATCH = 4096  # strings per call of the tokenizer


@dataclass(frozen=True)
class TokenTable:
    """Ragged token ids, memory-mapped: of each item's text, of each item's title, of each term's name."""

    items: CSR
    titles: CSR
    terms: CSR

    @staticmethod
    def load_or_make(
        folder: Path, tokenizer: str, max_length: int, texts: Strings, titles: Strings, terms: Strings
    ) -> "TokenTable":
        """Reads the table of `tokenizer` from its place under `folder`, after making it if it is not there.

        Of several processes that want it at once, one makes it.
        """
        source = _tokenizer_folder(tokenizer)
        place = folder / f"{_fingerprint(source)}-{max_length}"
        parts = {"items": texts, "titles": titles, "terms": terms}
        try:
            made_once(place, lambda: _make(place, source, max_length, parts), place / "done.json")
        except OSError as error:
            raise InputError(f"{place}: token ids cannot be written ({error.strerror or error})") from None
        return TokenTable(_read(place, "items"), _read(place, "titles"), _read(place, "terms"))


def transformers_library() -> ModuleType:
    """The package, silenced. It takes longer to import than torch, and what reads no language model does without."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _make(place: Path, source: Path, max_length: int, parts: dict[str, Strings]) -> None:
    library = transformers_library()  # slow to import, and not needed once the table is there
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"{source}: no tokenizer that transformers can load ({_one_line(error)})") from None
    draft = place.with_name(f".{place.name}.draft-{os.getpid()}")
    try:
        draft.mkdir()
        for name, strings in parts.items():
            rows = _tokenize(tokenizer, strings, max_length, f"tokenizing {name}")
            np.save(draft / f"{name}.indptr.npy", rows.indptr)
            np.save(draft / f"{name}.indices.npy", rows.indices)
        (draft / "done.json").write_text(json.dumps({"tokenizer": source.name, "max_length": max_length}) + "\n")
        draft.rename(place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _tokenize(tokenizer, strings: Strings, max_length: int, description: str) -> CSR:  # noqa: ANN001
    indptr = np.zeros(len(strings) + 1, dtype=np.int64)
    parts = [np.zeros(0, dtype=np.int32)]
    for start in track(range(0, len(strings), _BATCH), description):
        stop = min(start + _BATCH, len(strings))
        batch = [strings[row] for row in range(start, stop)]
        ids = tokenizer(batch, add_special_tokens=False, truncation=True, max_length=max_length)["input_ids"]
        indptr[start + 1 : stop + 1] = [len(row) for row in ids]
        parts += [np.asarray(row, dtype=np.int32) for row in ids]
    return CSR(np.cumsum(indptr), np.concatenate(parts))


def _read(place: Path, name: str) -> CSR:
    try:
        indptr = np.asarray(np.load(place / f"{name}.indptr.npy", mmap_mode="r", allow_pickle=False))
        indices = np.asarray(np.load(place / f"{name}.indices.npy", mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError) as error:
        raise InputError(f"{place}: token ids of {name} cannot be read ({error}); remove this folder") from None
    if indptr[-1] != len(indices):
        raise InputError(f"{place}: token ids of {name} are cut off; remove this folder")
    return CSR(indptr, indices)


def _tokenizer_folder(tokenizer: str) -> Path:
    folder = Path(tokenizer)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(tokenizer, allow_patterns=["config.json", *_TOKENIZER_FILES]))
    except (HFValidationError, OSError) as error:
        raise InputError(f"tokenizer '{tokenizer}': neither a folder nor a hub id ({_one_line(error)})") from None


def _fingerprint(folder: Path) -> str:
    """A hash over the names and contents of the tokenizer's files."""
    digest = hashlib.sha256()
    present = [name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not present:
        raise InputError(f"{folder}: no tokenizer files there (tokenizer.json, vocab.txt, spiece.model, …)")
    for name in present:
        content = (folder / name).read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
