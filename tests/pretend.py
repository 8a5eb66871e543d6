"""A GPU that is not there: tensors on the CPU of which it is known where they would be.

Inside `pretended_gpu`, torch seems to have one GPU. What is made there or moved there is computed on the CPU and
marked, and what reads marked and other tensors fails, as it would on a real GPU. So a missing `.to(device)` shows on
every machine; what a GPU computes does not.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
ATEN = torch.ops.aten
READ_BOTH = {ATEN.copy_, ATEN._foreach_copy_, ATEN._has_compatible_shallow_copy_type}
INDEXING = {ATEN.index, ATEN.index_put, ATEN.index_put_}  # a GPU takes places from the CPU, too


class _Generator(torch.Generator):
    """Draws on the CPU for the device that it was made for."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        made = super().__new__(cls)
        made.drawn_for = GPU if _is_gpu(device) else torch.device("cpu")
        return made

    @property
    def device(self) -> torch.device:
        return self.drawn_for


class _Marks:
    """What is on the GPU; it is kept, so that nothing else takes its place in memory."""

    def __init__(self) -> None:
        self.kept: dict[int, Any] = {}

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return id(_shared(tensor)) in self.kept

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        self.kept[id(_shared(tensor))] = _shared(tensor)
        return tensor


class _Checks(TorchDispatchMode):
    """Fails where an operation reads tensors of both devices; marks what it makes of those on the GPU."""

    def __init__(self, marks: _Marks) -> None:
        super().__init__()
        self.marks, self.on = marks, True

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found, kind = function(*args, **(kwargs or {})), function.overloadpacket
        if self.on and kind not in READ_BOTH:
            read = filter(torch.is_tensor, tree_leaves((args[:1] if kind in INDEXING else args, kwargs)))
            # A number on the CPU may stand beside what is on a GPU.
            there = {one in self.marks for one in read if one.dim() or one in self.marks}
            if len(there) > 1:
                raise RuntimeError(f"{function}: expected all tensors to be on the same device, found cuda:0 and cpu")
            if True in there:
                for one in filter(torch.is_tensor, tree_leaves(found)):
                    self.marks.add(one)
        return found


class _Devices(TorchFunctionMode):
    """Makes and moves on the CPU what is asked for on the GPU, and marks it."""

    def __init__(self, checks: _Checks) -> None:
        super().__init__()
        self.checks, self.marks = checks, checks.marks

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return self._moved(function, args, kwargs)
        if function is torch.Tensor.numpy and args[0] in self.marks:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if kwargs.get("device") is None:
            return function(*args, **kwargs)
        wanted = _is_gpu(kwargs["device"])
        if _is_gpu(getattr(kwargs.get("generator"), "device", kwargs["device"])) != wanted:
            raise RuntimeError(f"{function}: the generator is on another device than what it draws")
        found = function(*args, **{**kwargs, "device": "cpu" if wanted else kwargs["device"]})
        return self.marks.add(found) if wanted else found

    def _moved(self, function: Callable, args: tuple, kwargs: dict) -> torch.Tensor:
        tensor, *rest = args
        there = tensor in self.marks
        devices = [one for one in (*rest, *kwargs.values()) if isinstance(one, torch.device | str)]
        if torch.device("meta") in devices:
            return function(*args, **kwargs)
        if function is not torch.Tensor.to:
            devices, rest = [GPU if function is torch.Tensor.cuda else "cpu"], []
        like = [one in self.marks for one in rest if torch.is_tensor(one)]
        wanted = _is_gpu(devices[0]) if devices else like[0] if like else there
        rest = ["cpu" if isinstance(one, torch.device | str) else one for one in rest]
        kwargs = {name: value for name, value in kwargs.items() if name != "device"}
        self.checks.on = False
        try:
            moved = tensor.to(*rest, **kwargs) if rest or kwargs else tensor
            moved = moved.clone() if moved is tensor and wanted != there else moved
        finally:
            self.checks.on = True
        return self.marks.add(moved) if wanted else moved


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Nothing that a real GPU alone has is there: no streams, no memory, no bf16 by its autocast but the CPU's."""
    checks, own, autocast = _Checks(_Marks()), torch._C.TensorBase.device, torch.autocast

    def device(tensor: torch.Tensor) -> torch.device:
        with torch._C.DisableTorchFunction():
            real = own.__get__(tensor)
            return GPU if real.type == "cpu" and tensor in checks.marks else real

    with ExitStack() as stack:
        for name, put in {
            "Tensor.device": property(device),
            "Tensor.is_cuda": property(lambda tensor: device(tensor).type == "cuda"),
            "Generator": _Generator,
            "autocast": lambda kind, *args, **kwargs: autocast("cpu", *args, **kwargs),
            "cuda.is_available": lambda: True,
            "cuda.device_count": lambda: 1,
            "cuda.max_memory_allocated": lambda: 0,
        }.items():
            stack.enter_context(mock.patch(f"torch.{name}", put, create=True))
        stack.enter_context(_Devices(checks))
        stack.enter_context(checks)
        yield


def _shared(tensor: torch.Tensor) -> Any:
    """What views of one tensor have in common: its storage, where there is one."""
    return tensor.untyped_storage() if tensor.layout is torch.strided else tensor


def _is_gpu(device: Any) -> bool:
    return torch.device(device).type == "cuda"
