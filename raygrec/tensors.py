"""Tensors by name in a safetensors file, whose header holds a checksum of them."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from raygrec.errors import InputError
from raygrec.storage import replaced

CHECKSUM = "blake2b"  # its key in the header


def save_tensors(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes tensors and `metadata`, atomically; `StorageError` where the disk is full."""
    with replaced(file, size(tensors)) as draft:
        save_file(tensors, draft, {**(metadata or {}), CHECKSUM: checksum(tensors)})


def load_tensors(file: Path) -> dict[str, torch.Tensor]:
    """What `save_tensors` wrote, or any safetensors file; `InputError` where it is damaged or no such file.

    A file without a checksum is of another program, or of an earlier version: what safetensors itself sees is
    seen of it, such as a missing end.
    """
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: not readable as safetensors ({error})") from None
    if CHECKSUM in metadata and metadata[CHECKSUM] != checksum(tensors):
        raise InputError(f"{file}: damaged, its tensors do not have the checksum in its header")
    return tensors


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    """Over names, types, shapes and values, whatever their order."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def size(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of all values."""
    return sum(tensor.nbytes for tensor in tensors.values())
