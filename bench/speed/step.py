"""Row 4: training steps, against the bare language model on the same positions, and against Hugging Face's Trainer."""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.speed.measure import compared, in_turns, shares, write
from bench.speed.ready import FEW, Ready, beauty, ready, stage_of
from raygrec.draws import Draws
from raygrec.model.backbone import Backbone
from raygrec.model.prompts import PAD, PromptBatch
from raygrec.train import loop
from raygrec.train.engine import Engine, LocalEngine

ROUNDS, STEPS = 5, 4  # steps of a round
OURS, BARE, TRAINER = "raygrec", "backbone alone", "Trainer"
ASKED = "backbone alone, the last layer as raygrec computes it"
WHOLE = "backbone.layers=null"
ALONE = [f"model.contrast.l{number}=0" for number in (1, 2, 3)]
# What each is compared with: the Trainer's side has no contrast.
JOBS = {
    "GLTA": ((BARE, TRAINER), "glta.yaml"),
    "GLTA, all of MiniLM": ((BARE, TRAINER), "glta.yaml", WHOLE),
    "GAL-Rec, L0 alone": ((BARE, TRAINER), "galrec.yaml", *ALONE),
    "GAL-Rec, L0 alone, all of MiniLM": ((BARE, TRAINER), "galrec.yaml", WHOLE, *ALONE),
    "GAL-Rec, L0 to L3": ((BARE,), "galrec.yaml"),
    "GAL-Rec, L0 to L3, all of MiniLM": ((BARE,), "galrec.yaml", WHOLE),
}


def main() -> None:
    store, cases, where = beauty(), [], {}
    for name, (others, job, *settings) in JOBS.items():
        one = Steps(ready(job, store, job.removesuffix(".yaml"), FEW, *settings))
        cases += one.cases(name, others)
        where[name] = shares(lambda one=one: one.ours(0))
    shares_of_step = [case["alike"] for case in cases if "alike" in case]
    floor = min([*shares_of_step, *(case["ratio"]["median"] for case in cases if case["against"] == BARE)])
    faster = min(case["ratio"]["median"] for case in cases if case["against"] == TRAINER)
    padding = max(case["padding"][OURS] for case in cases)
    write(
        "step",
        {
            "row": 4,
            "title": "Training steps on real (non-padding) tokens (Amazon Beauty)",
            "against": "forward and, where there is one, backward of the language model alone, whole, on the same "
            "positions (ratio: our speed over its; above 1 where the last layer, which raygrec computes only where it "
            "is asked for, weighs more than all the rest), and Hugging Face's Trainer on the same prompts in random "
            "order, with nodes as new words and one linear layer to all items",
            "target": "≥ 85 % of the floor; ≥ 1.5× Trainer; padding under 5 %",
            "reached": floor >= 0.85 and faster >= 1.5 and padding < 0.05,
            "cases": cases,
            "where": where,
        },
        "accelerate",
    )


class Steps:
    """The same users' prompts through the loop's own step, the bare language model and the Trainer."""

    def __init__(
        self, one: Ready, engine: Engine | None = None, clock: Callable[[], float] = time.process_time
    ) -> None:
        self.one, self.clock = one, clock
        self.stage = stage_of(one.config, one.prompts)
        self.engine = engine or LocalEngine(one.model, one.config.engine)
        self.order = np.zeros((0, 0), dtype=np.int64)
        self.calls: list[tuple[bool, tuple[Any, ...]]] = []  # with gradient or not, and what the backbone was given
        self.given = self.calls
        self.backbone: Backbone = one.model.backbone
        self.backbone.register_forward_pre_hook(lambda _, given: self.calls.append((torch.is_grad_enabled(), given)))
        self.tokens: dict[str, list[float]] = {OURS: [], TRAINER: []}
        self.places: dict[str, list[float]] = {OURS: [], TRAINER: []}

    def cases(self, name: str, others: tuple[str, ...]) -> list[dict[str, Any]]:
        ways = {BARE: self.bare, TRAINER: Glued(self).steps}
        sides = {OURS: self.ours, **{other: ways[other] for other in others}, ASKED: partial(self.bare, whole=False)}
        seconds = in_turns(sides, ROUNDS, before=self.draw)
        measured = [side for side in self.tokens if side in sides]
        work = {side: float(np.mean(self.tokens[side][1:])) for side in measured}
        padding = {side: 1 - sum(self.tokens[side]) / sum(self.places[side]) for side in measured}
        found = []
        for other in others:
            done = {OURS: work[OURS], other: work.get(other, work[OURS])}
            case = compared(f"{name}, {other}", seconds, OURS, other, work=done, unit="tokens/s")
            found.append(case | {"against": other, "padding": padding})
        told = "; ".join(f"{side} {share:.1%}" for side, share in padding.items())
        alike = float(np.median(np.array(seconds[ASKED]) / np.array(seconds[OURS])))
        found[-1]["note"] = (
            f"padding: {told}; the language model, last layer as raygrec computes it: {alike:.0%} of a step"
        )
        return found

    def draw(self, number: int) -> None:
        """Users of a round: some batches of an epoch in the loop's order, each of histories of like length."""
        self.order = loop.epoch_order(self.stage.lengths, self.stage.config.batch, Draws(number + 1))[:STEPS]
        self.calls.clear()

    def ours(self, number: int) -> None:
        updates = [
            loop._step(self.stage, self.engine, things, Draws(0, 0, number + 1, place), 1e-4, False)
            for place, things in enumerate(self.order)
        ]
        self.given = list(self.calls)
        self.tokens[OURS].append(sum(update.tokens for update in updates))
        self.places[OURS].append(sum(update.places for update in updates))

    def bare(self, _: int, whole: bool = True) -> None:
        """whole: the last layer too is computed at every position."""
        for gradient, (embeds, mask, keys, past, asked) in self.given:
            with torch.set_grad_enabled(gradient), self.engine.autocast():
                given = embeds.detach().requires_grad_(gradient), mask, keys, past, None if whole else asked
                hidden = self.backbone(*given)
            if gradient:
                hidden.backward(torch.ones_like(hidden))
        self.one.model.zero_grad()


class Glued(nn.Module):
    """What one writes without raygrec: nodes are new words, a linear layer names the next item, a padding mask."""

    def __init__(self, steps: Steps) -> None:
        super().__init__()
        self.measured = steps
        symbols = steps.one.prompts.symbols
        config = steps.one.config
        backbone = Backbone(config.backbone)
        adapted = getattr(config.model, "tuning", "") == "lora"
        self.language_model = (backbone.adapt(config.model.lora) if adapted else backbone.tune()).model
        if adapted and config.engine.precision == "bf16":  # as one loads them, and as raygrec keeps them
            for parameter in self.language_model.parameters():
                parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else torch.bfloat16)
        if config.engine.activation_checkpointing:
            self.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        words = symbols.first_slot + symbols.slots
        self.language_model.resize_token_embeddings(words, mean_resizing=False)
        self.head = nn.Linear(self.language_model.config.hidden_size, symbols.items)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        hidden = self.language_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        asked = labels >= 0
        return {"loss": nn.functional.cross_entropy(self.head(hidden[asked]), labels[asked])}

    def collate(self, users: list[int]) -> dict[str, torch.Tensor]:
        steps = self.measured
        batch: PromptBatch = steps.stage.build(np.array(users), Draws(len(users)))
        labels = torch.full_like(batch.symbols, -100)
        first = batch.targets.indptr[:-1]
        labels.view(-1)[batch.answers] = batch.targets.items[first]
        mask = batch.symbols != PAD
        steps.tokens[TRAINER][-1] += int(mask.sum())
        steps.places[TRAINER][-1] += mask.numel()
        return {"input_ids": batch.symbols.clamp(min=0), "attention_mask": mask.long(), "labels": labels}

    def steps(self, number: int) -> float:
        """Seconds of the Trainer's own steps; its set-up does not count."""
        from transformers import Trainer, TrainerCallback, TrainingArguments

        measured = self.measured
        measured.tokens[TRAINER].append(0)
        measured.places[TRAINER].append(0)
        config = measured.stage.config
        users = Draws(number + 1).permutation(measured.order.size)
        seconds: list[float] = []

        class Clock(TrainerCallback):
            def on_train_begin(self, *_: object, **__: object) -> None:
                seconds.append(measured.clock())

            def on_train_end(self, *_: object, **__: object) -> None:
                seconds.append(measured.clock())

        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                per_device_train_batch_size=min(config.micro_batch, config.batch),
                gradient_accumulation_steps=-(-config.batch // config.micro_batch),
                max_steps=STEPS,
                learning_rate=1e-4,
                use_cpu=not torch.cuda.is_available(),
                bf16=measured.one.config.engine.precision == "bf16",
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
            )
            Trainer(
                self,
                arguments,
                data_collator=self.collate,
                train_dataset=measured.order.ravel()[users].tolist(),
                callbacks=[Clock()],
            ).train()
        return seconds[1] - seconds[0]
