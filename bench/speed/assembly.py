"""Row 3: prompts gathered from arrays, against tokenizing them in the loop, and what a step waits for them."""

from typing import Any

import numpy as np
import torch

from bench.speed.measure import compared, in_turns, spread, write
from bench.speed.ready import FEW, Ready, beauty, ready
from raygrec.draws import Draws
from raygrec.model.backbone import load_tokenizer

ROUNDS, STEPS = 15, 5
TITLE = 12  # tokens of a title in GAL-Rec's prompts that hold titles
MARKS = ("", "[item]", "[user]", "[slot]")  # what stands in a text for each kind of symbol


def main() -> None:
    store = beauty()
    jobs = {
        "GLTA": ready("glta.yaml", store, "glta", FEW),
        "GAL-Rec": ready("galrec.yaml", store, "galrec", FEW),
        "GAL-Rec with titles": ready("galrec.yaml", store, "galrec", FEW, f"model.title_tokens={TITLE}"),
    }
    cases = [against_text(name, one) for name, one in jobs.items()]
    waits = {name: waiting(jobs[name]) for name in ("GLTA", "GAL-Rec")}
    for case in cases:
        if case["case"] in waits:
            case["wait"] = waits[case["case"]]
    least = min(case["ratio"]["median"] for case in cases)
    longest = max(wait["median"] for wait in waits.values())
    write(
        "assembly",
        {
            "row": 3,
            "title": "Batches of 128 training prompts (Amazon Beauty, MiniLM's tokenizer)",
            "against": "the same prompts as text, with placeholders for nodes, through the fast tokenizer in the loop",
            "target": "≥ 20× tokens/s; loader wait under 2 % of a step",
            "reached": least >= 20 and longest < 0.02,
            "cases": cases,
        },
        "tokenizers",
    )


def against_text(name: str, one: Ready) -> dict[str, Any]:
    """Tokens a second of both; each side counts the tokens that it has made, padding left out."""
    words = Words(one)
    made: dict[str, list[int]] = {"arrays": [], "tokenizer": []}

    def arrays(number: int) -> None:
        batch = one.prompts.training(one.users(number), Draws(0, number))
        made["arrays"].append(int((batch.symbols >= 0).sum()))

    def text(_: int) -> None:
        made["tokenizer"].append(words.tokenize())

    seconds = in_turns({"arrays": arrays, "tokenizer": text}, ROUNDS, before=words.draw)
    work = {side: float(np.mean(tokens[1:])) for side, tokens in made.items()}
    moved = 8 * work["arrays"]  # what leaves it: int64 symbols
    return compared(name, seconds, "arrays", "tokenizer", moved=moved, work=work, unit="tokens/s", tokens=work)


class Words:
    """A batch's prompts in words. They are made from its arrays before the clock runs: strings cost nothing here."""

    def __init__(self, one: Ready) -> None:
        self.one = one
        self.tokenizer = load_tokenizer("minilm")
        self.tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS[1:])})
        self.texts: list[str] = []

    def draw(self, number: int) -> None:
        base = self.one.prompts.symbols
        first = [base.first_item, base.first_user, base.first_slot]
        self.texts = []
        for row in self.one.prompts.training(self.one.users(number), Draws(0, number)).symbols.numpy():
            shown = row[row >= 0][1:]  # the tokenizer itself puts the opening token there
            kinds = np.searchsorted(first, shown, side="right")
            words = self.tokenizer.convert_ids_to_tokens(np.where(kinds == 0, shown, 0).tolist())
            marked = [MARKS[kind] or word for kind, word in zip(kinds.tolist(), words, strict=True)]
            self.texts.append(self.tokenizer.convert_tokens_to_string(marked))

    def tokenize(self) -> int:
        batch = self.tokenizer(self.texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
        return int(batch["attention_mask"].sum())


def waiting(one: Ready) -> dict[str, float]:
    """The share of a training step in which it waits for its prompts."""
    optimizer = torch.optim.AdamW([p for p in one.model.parameters() if p.requires_grad], lr=1e-4)

    def build(number: int) -> None:
        one.prompts.training(one.users(number), Draws(0, number))

    def step(number: int) -> None:
        one.step(one.users(number), number)
        optimizer.step()

    seconds = in_turns({"build": build, "step": step}, STEPS)
    return spread(np.array(seconds["build"]) / np.array(seconds["step"]))
