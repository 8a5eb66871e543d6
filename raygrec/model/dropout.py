"""Dropout whose mask is a function of what it falls on: the same for any number of workers, and after a resume."""

import torch

_STEP = 0x1E3779B97F4A7C15
_MIX = (0x3F58476D1CE4E5B9, 0x14D049BB133111EB)


def keyed_dropout(
    values_ND: torch.Tensor, rate: float, keys_N: torch.Tensor, places_N: torch.Tensor, use: int
) -> torch.Tensor:
    """`values_ND` with each entry zero with probability `rate`, the others divided by 1 − rate.

    The mask follows from each row's key and place (int64) and from what it is for: rows of other prompts, of the
    same batch or not, change nothing.
    """
    if not rate:
        return values_ND
    rows_N = _mixed(_mixed(keys_N + use * _STEP) + places_N * _STEP)
    columns_D = torch.arange(values_ND.shape[1], device=values_ND.device) * _STEP
    uniform_ND = (_mixed(rows_N[:, None] + columns_D) >> 20) & 0xFFFFFF
    return values_ND * (uniform_ND >= rate * 2**24) / (1 - rate)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """A bijective scrambling of int64 (xor-shifts and odd multipliers, as in splitmix64); sums wrap around."""
    for shift, factor in zip((30, 27), _MIX, strict=True):
        x = (x ^ (x >> shift)) * factor
    return x ^ (x >> 31)
