"""Row 5: GLTA's training steps around a frozen language model, against whole prompts and gradients through it all."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.speed.measure import Seconds, compared, in_turns, shares, spread, write
from bench.speed.ready import FEW, Ready, beauty, ready, stage_of
from raygrec.draws import Draws
from raygrec.model.prompts import PromptBatch
from raygrec.train import loop
from raygrec.train.engine import LocalEngine

ROUNDS, STEPS = 5, 2  # steps of a round
# The second has no gradients of weights, but no cache and all of the last layer; so has the third, with gradients.
OURS, WHOLE, NAIVE = "raygrec", "whole prompts", "naive"
READS = {form: f"{form}, without head and update" for form in (OURS, WHOLE, NAIVE)}
LONG = "Here are the items that a user has liked, the oldest first. Find what this user will like next:"
TARGET = 1.5


def main() -> None:
    store = beauty()
    small = [FEW, f"backbone.name={Path(os.environ['RAYGREC_DATA']) / 'stories260k'}", "backbone.layers=null"]
    models = {
        "Llama of 260 k": ready("glta.yaml", store, "frozen-llama", *small),
        "Llama of 260 k, long instruction": ready(
            "glta.yaml", store, "frozen-llama", *small, f'model.instruction="{LONG}"'
        ),
        "MiniLM, 6 layers": ready("glta.yaml", store, "frozen-minilm", FEW, "backbone.layers=null"),
    }
    steps = {
        f"{name}, {prompts}": Steps(one, whole)
        for name, one in models.items()
        for prompts, whole in (("histories alone", False), ("user-item prompts", True))
    }
    cases = [one.case(name) for name, one in steps.items()]
    write(
        "frozen",
        {
            "row": 5,
            "title": "Training steps of GLTA around a frozen language model (jobs/glta.yaml, Amazon Beauty)",
            "against": "its naive form: whole prompts, the last layer at every position, and gradients of all weights "
            "and embeddings of the language model; same prompts, passes and updates. Histories alone: what stage 3 "
            "begins with",
            "target": f"≥ {TARGET}×",
            "reached": min(case["ratio"]["median"] for case in cases) >= TARGET,
            "cases": cases,
            "where": {name: shares(partial(one.steps, OURS, 0)) for name, one in steps.items()},
        },
    )


class Steps:
    """The same users' prompts through the loop's own step in each form, and without what follows hidden states."""

    def __init__(self, one: Ready, whole: bool) -> None:
        self.one = one
        self.stage = stage_of(one.config, one.prompts, whole)
        self.engine = LocalEngine(one.model, one.config.engine)
        self.backbone = one.model.backbone
        self.narrow, self.asked = self.backbone._narrow, self.backbone.asked_parameters
        self.order = np.zeros((0, 0), dtype=np.int64)
        self.batches: list[PromptBatch] = []
        self.rounds: list[list[PromptBatch]] = []

    def case(self, name: str) -> dict[str, Any]:
        sides = {form: partial(self.steps, form) for form in READS}
        sides |= {side: partial(self.reads, form) for form, side in READS.items()}
        seconds = in_turns(sides, ROUNDS, before=self.draw)
        self.backbone.freeze()
        measured = self.rounds[-ROUNDS:]
        tokens = np.mean([sum(int(batch.lengths.sum()) for batch in batches) for batches in measured])
        flops = np.mean([sum(map(self.flops, batches)) for batches in measured])
        work = {OURS: float(tokens), NAIVE: float(tokens)}
        case = compared(name, seconds, OURS, NAIVE, float(flops), work=work, unit="tokens/s")
        alike = sum(self.shared(batch) * len(batch.symbols) for batches in measured for batch in batches)
        shared, gains = self.shared(measured[0][0]), parts(seconds)
        return case | {"parts": gains, "note": note(shared, alike / tokens / ROUNDS, gains)}

    def draw(self, number: int) -> None:
        """Users of a round: some batches of an epoch in the loop's order, each of histories of like length."""
        self.order = loop.epoch_order(self.stage.lengths, self.stage.config.batch, Draws(number + 1))[:STEPS]
        self.batches = [self.stage.build(users, draws(number, place)) for place, users in enumerate(self.order)]
        self.rounds.append(self.batches)

    def steps(self, form: str, number: int) -> None:
        stage = replace(self.stage, build=lambda *given: self.given(form, self.stage.build(*given)))
        self.take(form)
        for place, users in enumerate(self.order):
            loop._step(stage, self.engine, users, draws(number, place), 1e-4, False)
            self.backbone.zero_grad()

    def reads(self, form: str, _: int) -> None:
        """Hidden states, forward and backward: what the forms differ in."""
        self.take(form)
        for batch in self.batches:
            self.one.model.hidden(self.given(form, batch), batch.answers).rows_ND.sum().backward()
            self.one.model.zero_grad()

    def take(self, form: str) -> None:
        self.backbone.requires_grad_(form == NAIVE)
        self.backbone._narrow = self.narrow if form == OURS else None

    def given(self, form: str, batch: PromptBatch) -> PromptBatch:
        return batch if form == OURS else replace(batch, prefix=0)

    def shared(self, batch: PromptBatch) -> int:
        return batch.prefix if self.backbone.family == "decoder" else 0

    def flops(self, batch: PromptBatch) -> float:
        """Of the language model's weights forward and for the gradient of what it is given, and of the head."""
        weights = sum(p.numel() for name, p in self.backbone.named_parameters() if "embed" not in name)
        tokens, answers = int((batch.lengths - self.shared(batch)).sum()), len(batch.answers)
        rows = self.one.model.symbols.items * self.one.model.nodes.width
        read = 2 * weights * (2 * tokens + self.shared(batch))
        return read - 4 * self.asked * (tokens - answers) + 6 * answers * rows


def draws(number: int, place: int) -> Draws:
    """Of a step: the same with and without its head."""
    return Draws(0, 0, number + 1, place)


def parts(seconds: Seconds) -> dict[str, dict[str, float]]:
    """What each part of it gains, of a step and of hidden states alone."""
    found = {}
    for what, sides in (("a step", {form: form for form in READS}), ("hidden states alone", READS)):
        ours, whole, naive = (np.array(seconds[sides[form]]) for form in (OURS, WHOLE, NAIVE))
        found[f"{what}: cache and last layer"] = spread(whole / ours)
        found[f"{what}: no gradients of weights"] = spread(naive / whole)
        found[f"{what}: both"] = spread(naive / ours)
    return found


def note(shared: int, share: float, gains: dict[str, dict[str, float]]) -> str:
    read = f"{shared} tokens that begin all prompts, {share:.0%} of all tokens, are read once"
    if not shared:
        read = "an encoder reads prompts whole: no cache, but the last layer of answers alone"
    told = [f"{name} ×{one['median']:.2f} ({one['low']:.2f}–{one['high']:.2f})" for name, one in gains.items()]
    return "; ".join([read, *told])
