"""What the processes of one run do together: who they are, sums, and what rank 0 alone finds out."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from raygrec.errors import InputError

T = TypeVar("T")


def world() -> tuple[int, int]:
    """(rank, world size); (0, 1) outside a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, on the values' own device, whichever one the process group's backend needs."""
    if world()[1] == 1:
        return values
    moved = values.to(device()) if dist.get_backend() == "nccl" else values
    dist.all_reduce(moved)
    return moved.to(values.device)


def shard(value: torch.Tensor, size: int) -> torch.Tensor:
    """[size] this rank's part of a value that is spread over the ranks, with zeros after its end."""
    start = world()[0] * size
    part = value.flatten()[start : start + size]
    return torch.nn.functional.pad(part, (0, size - len(part)))


def from_rank_0(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, which alone calls it, on every rank; its `InputError` is raised on all."""
    rank, workers = world()
    if workers == 1:
        return make()
    made: list[Any] = [None, None]
    if rank == 0:
        try:
            made[0] = make()
        except InputError as error:
            made[1] = str(error)
    dist.broadcast_object_list(made, device=device() if dist.get_backend() == "nccl" else torch.device("cpu"))
    if made[1] is not None:
        raise InputError(made[1])
    return made[0]


def device() -> torch.device:
    """This worker's accelerator, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def name_accelerator() -> None:
    """To be called before anything imports DeepSpeed, which otherwise prints what it finds; nobody is overruled."""
    os.environ.setdefault("DS_ACCELERATOR", device().type)
