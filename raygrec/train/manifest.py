"""The manifest of a folder: size and checksum of each of its files, written last."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from raygrec.errors import InputError
from raygrec.storage import sync

NAME = "manifest.json"
VERSION = 1


def seal(folder: Path) -> None:
    """Writes the manifest of all files in and below `folder`, and waits until everything is on the disk."""
    files = {name: _entry(folder / name) for name in _names(folder)}
    (folder / NAME).write_text(json.dumps({"version": VERSION, "files": files}, indent=2) + "\n", encoding="utf-8")
    for path in (*(folder / name for name in files), folder / NAME, *filter(Path.is_dir, folder.rglob("*")), folder):
        sync(path)


def check(folder: Path) -> None:
    """`InputError` that names the first file of `folder` that is not as it was sealed.

    Only files that lie in the folder are opened; the manifest's own names are never made into paths.
    """
    try:
        _check(folder)
    except OSError as error:
        raise InputError(f"{error.filename or folder}: cannot be read ({error.strerror or error})") from None


def _check(folder: Path) -> None:
    if folder.is_symlink():
        raise InputError(f"{folder}: is a link")
    sealed, names = _files(folder / NAME), _names(folder)
    for name in sorted({*names, *sealed}):
        file = folder / name
        if name not in sealed:
            raise InputError(f"{file}: is not in the manifest")
        if name not in names:
            raise InputError(f"{folder}: '{name}' of its manifest is missing")
        size = file.stat().st_size
        if size != sealed[name].get("bytes"):
            raise InputError(f"{file}: has {size} bytes, {sealed[name].get('bytes')} were written")
        if _entry(file) != sealed[name]:
            raise InputError(f"{file}: its checksum is not that of what was written")


def _files(file: Path) -> dict[str, dict[str, Any]]:
    if file.is_symlink() or not file.is_file():
        raise InputError(f"{file}: is missing; what lies beside it is not complete, or of an earlier version")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not readable ({error})") from None
    files = content.get("files") if isinstance(content, dict) and content.get("version") == VERSION else None
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise InputError(f"{file}: not a manifest of version {VERSION}")
    return files


def _names(folder: Path) -> list[str]:
    """Files in and below a folder but the manifest, as names relative to it; links are refused."""
    names = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise InputError(f"{path}: is a link")
        if path.is_file() and path != folder / NAME:
            names.append(path.relative_to(folder).as_posix())
    return names


def _entry(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16))
        return {"bytes": os.fstat(opened.fileno()).st_size, "blake2b": digest.hexdigest()}
