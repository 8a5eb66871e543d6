"""What GAL-Rec's hops look like: representations of many users, and how uniform and how aligned they are."""

import numpy as np
import torch

from raygrec.data.arrays import CSR
from raygrec.draws import Draws
from raygrec.model.contrast import alignment, uniformity
from raygrec.model.galrec import HOPS, GALRec, HopPrompts
from raygrec.progress import track


@torch.no_grad()
def hop_representations(
    model: GALRec, prompts: HopPrompts, users: np.ndarray, histories: CSR, batch: int = 256, seed: int = 0
) -> torch.Tensor:
    """Hidden states [n, 3, D] at the task tokens of users [n], on the CPU. histories: one row per user of the store."""
    device = next(model.parameters()).device
    found = []
    for start in track(range(0, len(users), batch), "representations of hops"):
        part = users[start : start + batch]
        asked = prompts.describing(part, histories.take(part), Draws(seed)).to(device)
        found.append(model.representations(asked).float().cpu())
    return torch.cat(found)


def hop_figures(representations_nhD: torch.Tensor) -> dict[str, float]:
    """Uniformity of each hop and alignment of each pair of hops (Wang & Isola 2020, `model/contrast.py`), by name."""
    hops = representations_nhD.unbind(1)
    figures = {f"uniformity {hop}-hop": uniformity(hops[hop]) for hop in range(HOPS)}
    for one, other in ((0, 1), (0, 2), (1, 2)):
        figures[f"alignment {one}-hop {other}-hop"] = alignment(hops[one], hops[other])
    return figures
