"""Row 6: the head's cross-entropy, whose logits never all stand in memory, against torch's over all of them."""

from collections.abc import Callable

import torch
from torch.nn import functional

from bench.speed.measure import compared, in_turns, peak_mib, write
from raygrec.model.head import CatalogueHead, Targets, positions_at_once

WIDTH, NODE_WIDTH = 384, 128
SIZES = {12_101: (4096, 7), 100_000: (512, 5), 1_000_000: (128, 3)}  # items: positions, rounds
FEW = 64  # positions beside which the memory is seen to grow, or not


def main() -> None:
    cases = []
    for items, (positions, rounds) in SIZES.items():
        sides = {name: step(name, items, positions) for name in ("in parts", "materialised")}
        seconds = in_turns({name: lambda _, run=run: run() for name, run in sides.items()}, rounds)
        # Forward once, backward twice: positions × items × node width; the rows R are made of the nodes.
        flops = 3 * 2 * positions * items * NODE_WIDTH + 2 * 2 * items * NODE_WIDTH**2
        memory = {
            "in parts": {str(count): peak_mib(step, "in parts", items, count) for count in (FEW, positions)},
            "materialised": {str(positions): peak_mib(step, "materialised", items, positions)},
        }
        logits = positions * items * 4 / 2**20
        more = {"positions": positions, "peak_mib": memory, "logits_mib": logits}
        cases.append(
            compared(f"{items:,} items × {positions:,} positions", seconds, "in parts", "materialised", flops, **more)
        )
    # What may grow: a part's logits, three copies at the most, and what each position has for itself, such as its
    # hidden state, query and their gradients. The rest of the memory is R, its gradient and the parameters'.
    own = {items: positions * (2 * WIDTH + 4 * NODE_WIDTH) for items, (positions, _) in SIZES.items()}
    flat = all(
        max(case["peak_mib"]["in parts"].values()) - min(case["peak_mib"]["in parts"].values())
        < 4 * (3 * positions_at_once(items, "cpu") * items + own[items]) / 2**20
        for case, items in zip(cases, SIZES, strict=True)
    )
    write(
        "head",
        {
            "row": 6,
            "title": "GLLM head and cross-entropy, forward and backward",
            "against": "torch's cross_entropy over materialised logits",
            "target": "peak memory flat in items × positions; not slower at 12 k",
            "reached": flat and cases[0]["ratio"]["median"] >= 0.97,
            "cases": cases,
        },
    )


def step(name: str, items: int, positions: int) -> Callable[[], None]:
    """One forward and backward pass of the head."""
    torch.manual_seed(0)
    head = CatalogueHead(WIDTH, items, NODE_WIDTH, None)
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
