"""GPUs as their datasheets describe them: what `raygrec plan` reckons with."""

from dataclasses import dataclass

from raygrec.config import nearest_key
from raygrec.errors import InputError


@dataclass(frozen=True)
class Accelerator:
    """One kind of GPU.

    memory: usable GiB. bf16, fp32: dense TFLOP/s, without sparsity; fp32 without TF32, as torch computes by default.
    link: GB/s one way to the other GPUs of its node. node: GPUs of a node. device: what torch calls its kind.
    """

    memory: float
    bf16: float
    fp32: float
    link: float
    node: int = 8
    device: str = "cuda"

    def rate(self, precision: str) -> float:
        """FLOP/s."""
        return 1e12 * (self.bf16 if precision == "bf16" else self.fp32)


NETWORK = 50.0  # GB/s one way for each GPU between nodes: 400 Gbit/s, assumed
HOST_LINK = 25.0  # GB/s between a GPU and its host's memory: PCIe 4 × 16, assumed
HOST_ADAM = 20.0  # GB/s of optimizer state that a GPU's share of the host's cores updates, assumed

ACCELERATORS = {
    "H100": Accelerator(79.6, 989.0, 67.0, 450.0),
    "H200": Accelerator(140.4, 989.0, 67.0, 450.0),
    "B200": Accelerator(178.0, 2250.0, 75.0, 900.0),
    "A100-80": Accelerator(79.2, 312.0, 19.5, 300.0),
    "A100-40": Accelerator(39.4, 312.0, 19.5, 300.0),
    "L40S": Accelerator(44.4, 362.0, 91.6, 32.0),
    "L4": Accelerator(22.0, 121.0, 30.3, 32.0),
    "A10G": Accelerator(22.0, 70.0, 31.5, 32.0, 4),
}


def accelerator(name: str) -> Accelerator:
    """The GPU of that name, upper or lower case; `InputError` names the nearest known one."""
    found = {known.lower(): one for known, one in ACCELERATORS.items()}.get(name.lower())
    if found is None:
        raise InputError(
            f"--gpu-type {name}: expected one of {', '.join(ACCELERATORS)}{nearest_key(name.upper(), [*ACCELERATORS])}"
        )
    return found
