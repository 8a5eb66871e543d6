"""Row 6: the head's cross-entropy, whose logits never all stand in memory, against torch's over all of them."""

from collections.abc import Callable

import torch
from torch.nn import functional

from bench.speed.measure import compared, in_turns, peak_mib, shares, write
from raygrec.model.head import LOGITS_AT_ONCE, CatalogueHead, Targets

WIDTH, NODE_WIDTH = 384, 128
SIZES = {12_101: (4096, 10), 100_000: (2048, 6), 1_000_000: (512, 5)}  # items: positions, rounds
FEW = 64  # positions beside which the memory is seen to grow, or not


def main() -> None:
    cases, profile = [], {}
    for items, (positions, rounds) in SIZES.items():
        sides = {name: step(name, items, positions) for name in ("in parts", "materialised")}
        seconds = in_turns({name: lambda _, run=run: run() for name, run in sides.items()}, rounds)
        # Forward once, backward twice: positions × items × node width; the rows R are made of the nodes.
        flops = 3 * 2 * positions * items * NODE_WIDTH + 2 * 2 * items * NODE_WIDTH**2
        memory = {
            name: {str(count): peak_mib(step, name, items, count) for count in (FEW, positions)} for name in sides
        }
        logits = positions * items * 4 / 2**20
        more = {"positions": positions, "peak_mib": memory, "logits_mib": logits}
        cases.append(
            compared(f"{items:,} items × {positions:,} positions", seconds, "in parts", "materialised", flops, **more)
        )
        profile[f"{items:,} items"] = shares(sides["in parts"])
    grown = [case["peak_mib"]["in parts"] for case in cases]
    flat = all(max(one.values()) - min(one.values()) < 2.5 * LOGITS_AT_ONCE * 4 / 2**20 for one in grown)
    write(
        "head",
        {
            "row": 6,
            "title": "GLLM head and cross-entropy, forward and backward",
            "against": "torch's cross_entropy over materialised logits",
            "target": "peak memory flat in items × positions; not slower at 12 k",
            "reached": flat and cases[0]["ratio"]["median"] >= 0.97,
            "cases": cases,
            "where": profile,
        },
    )


def step(name: str, items: int, positions: int) -> Callable[[], None]:
    """One forward and backward pass of the head."""
    torch.manual_seed(0)
    head = CatalogueHead(WIDTH, items, NODE_WIDTH, None, free=True)
    nodes, hidden = torch.randn(items, NODE_WIDTH), torch.randn(positions, WIDTH, requires_grad=True)
    wanted = torch.randint(items, (positions,))
    targets = Targets(torch.arange(positions + 1), wanted, torch.ones(positions))

    def run() -> None:
        rows = head.rows(nodes, None)
        if name == "in parts":
            loss = head(hidden, rows, targets)
        else:
            loss = functional.cross_entropy(head(hidden, rows), wanted, reduction="sum")
        loss.backward()
        head.zero_grad(set_to_none=True)
        hidden.grad = None

    return run
