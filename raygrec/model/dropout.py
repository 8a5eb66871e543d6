"""Dropout whose mask is a function of what it falls on: the same for any number of workers, and after a resume."""

import torch

_STEP = 0x1E3779B97F4A7C15
_DRAWS = 4  # entries that one scrambled number decides on, with 16 bits each
_MIX = (0x3F58476D1CE4E5B9, 0x14D049BB133111EB)


def keyed_dropout(
    values_ND: torch.Tensor, rate: float, keys_N: torch.Tensor, places_N: torch.Tensor, use: int
) -> torch.Tensor:
    """`values_ND` with each entry zero with probability `rate`, the others divided by 1 − rate.

    The mask follows from each row's key and place (int64) and from what it is for: rows of other prompts, of the
    same batch or not, change nothing. `rate` counts in steps of 2^-16.
    """
    if not rate:
        return values_ND
    rows_N = _mixed(_mixed(keys_N + use * _STEP % 2**63) + places_N * _STEP)
    width = values_ND.shape[1]
    columns = torch.arange(-(-width // _DRAWS), device=values_ND.device) * _STEP
    uniform_ND = _mixed(rows_N[:, None] + columns).view(torch.int16)[:, :width]
    return values_ND * (uniform_ND >= round(rate * 2**16) - 2**15) / (1 - rate)


def prompt_dropout(values_BTD: torch.Tensor, rate: float, keys_B: torch.Tensor, use: int) -> torch.Tensor:
    """`keyed_dropout` of all places of B prompts."""
    count, length = values_BTD.shape[:2]
    places = torch.arange(length, device=keys_B.device).repeat(count)
    dropped = keyed_dropout(values_BTD.flatten(0, 1), rate, keys_B.repeat_interleave(length), places, use)
    return dropped.view_as(values_BTD)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """A bijective scrambling of int64 (xor-shifts and odd multipliers, as in splitmix64); sums wrap around."""
    for shift, factor in zip((30, 27), _MIX, strict=True):
        x = (x ^ (x >> shift)) * factor
    return x ^ (x >> 31 & 2**33 - 1)  # without the sign's copies, which would tilt the upper bits
