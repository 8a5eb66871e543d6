"""Row 9: what GAL-Rec's contrast and its queue add to a training step."""

import torch

from bench.speed.measure import compared, in_turns, shares, write
from bench.speed.ready import FEW, beauty, ready

LENGTHS = (0, 1024, 8192, 65_536)
ROUNDS = 7
PROJECTION = 128  # as MoCo's
ALONE = "L0 alone"


def main() -> None:
    store = beauty()
    off = [f"model.contrast.l{number}=0" for number in (1, 2, 3)]
    sides = {ALONE: ready("galrec.yaml", store, "galrec", FEW, *off)}
    longest, none = f"K = {LENGTHS[-1]:,}", f"K = {LENGTHS[0]:,}"
    wanted = {f"K = {length:,}": [f"model.contrast.queue={length}"] for length in LENGTHS}
    wanted[f"{longest}, {PROJECTION} entries"] = [*wanted[longest], f"model.contrast.projection={PROJECTION}"]
    for name, settings in wanted.items():
        sides[name] = one = ready("galrec.yaml", store, "galrec", FEW, *settings)
        for queue in one.model.queues.values():  # as after many steps
            rows = torch.randn_like(queue.rows())
            queue.enqueue(rows, torch.arange(len(rows)) % len(one.trainable))
    runs = {name: lambda number, one=one: one.step(one.users(number), number) for name, one in sides.items()}
    seconds = in_turns(runs, ROUNDS)
    cases = [compared(name, seconds, ALONE, name) for name in wanted]
    # Anchors and positives of both pairs of a side meet all K rows: forward, and the anchors' gradient.
    cases.append(compared(f"{longest} against {none}", seconds, none, longest))
    write(
        "contrast",
        {
            "row": 9,
            "title": "A training step of GAL-Rec with contrast and queues (jobs/galrec.yaml, Amazon Beauty)",
            "against": "the same users with L0 alone, under `raygrec`; with contrast, under `other`",
            "target": "≤ 10 % a step at K = 65,536",
            "reached": cases[len(LENGTHS) - 1]["ratio"]["median"] <= 1.1,
            "cases": cases,
            "where": {longest: shares(lambda: runs[longest](0)), ALONE: shares(lambda: runs[ALONE](0))},
        },
    )
