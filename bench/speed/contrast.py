"""Row 9: what GAL-Rec's contrast and its queue add to a training step."""

import torch

from bench.speed.measure import compared, in_turns, shares, write
from bench.speed.ready import FEW, beauty, ready

LENGTHS = (0, 1024, 8192, 65_536)
ROUNDS = 7
ALONE = "L0 alone"


def main() -> None:
    store = beauty()
    off = [f"model.contrast.l{number}=0" for number in (1, 2, 3)]
    sides = {ALONE: ready("galrec.yaml", store, "galrec", FEW, *off)}
    for length in LENGTHS:
        sides[f"K = {length:,}"] = one = ready("galrec.yaml", store, "galrec", FEW, f"model.contrast.queue={length}")
        for queue in one.model.queues.values():  # as after many steps
            queue.enqueue(torch.randn(length, one.model.backbone.width), torch.arange(length) % len(one.trainable))
    runs = {name: lambda number, one=one: one.step(one.users(number), number) for name, one in sides.items()}
    seconds = in_turns(runs, ROUNDS)
    cases = [compared(name, seconds, ALONE, name) for name in list(sides)[1:]]
    longest, none = f"K = {LENGTHS[-1]:,}", f"K = {LENGTHS[0]:,}"
    # Anchors and positives of both pairs of a side meet all K rows: forward, and the anchors' gradient.
    cases.append(compared(f"{longest} against {none}", seconds, none, longest))
    write(
        "contrast",
        {
            "row": 9,
            "title": "A training step of GAL-Rec with contrast and queues (jobs/galrec.yaml, Amazon Beauty)",
            "against": "the same users with L0 alone",
            "target": "≤ 10 % a step at K = 65,536",
            "reached": cases[len(LENGTHS) - 1]["ratio"]["median"] <= 1.1,
            "cases": cases,
            "where": {longest: shares(lambda: runs[longest](0)), ALONE: shares(lambda: runs[ALONE](0))},
        },
    )
