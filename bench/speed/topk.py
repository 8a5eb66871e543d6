"""Row 7: top-10 lists from a finished run, against generating what to recommend with the same language model."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.speed.measure import compared, in_turns, shares, write
from bench.speed.ready import FEW, beauty, job_config, ready
from raygrec.data.store import Store
from raygrec.serve.topk import FinishedRun
from raygrec.train.assembly import save_model
from raygrec.train.folder import RunFolder, with_absolute_paths

JOBS = {"GLTA": "glta.yaml", "GAL-Rec": "galrec.yaml"}
K = 10
USERS, GENERATED = 512, 8  # users a round of each side: as many as fill its batches
ROUNDS = 4
TITLE, SHOWN_TITLES, SHOWN_TITLE = 24, 8, 12  # tokens of a generated title; titles of a history, and their tokens
DIGITS, BASE, SHOWN_IDS = 4, 16, 30  # an item as four tokens, as semantic ids are; items of a history
FIRST_DIGIT = 100  # token ids that stand for digits: any will do

Tokens = list[int]


def main() -> None:
    runs = {name: FinishedRun(finished(job)) for name, job in JOBS.items()}
    run = runs["GLTA"]
    users = np.random.default_rng(0).permutation(run.store.num_users)
    sides: dict[str, Callable[[int], object]] = {
        name: lambda number, one=one: one.top(part(users, number, USERS), K) for name, one in runs.items()
    }
    for kind, rows in {"titles": titles(run), "ids": ids(run)}.items():
        sides[kind] = generator(run, kind, rows, users)
    seconds = in_turns(sides, ROUNDS)
    cases = [
        compared(
            f"{name}, beam search over {what}",
            seconds,
            name,
            kind,
            flops_of(one, part(users, 0, USERS)),
            work={name: USERS, kind: GENERATED},
            unit="users/s",
        )
        for name, one in runs.items()
        for kind, what in (
            ("titles", f"titles (first {TITLE} tokens)"),
            ("ids", f"ids of {DIGITS} tokens"),
        )
    ]
    write(
        "topk",
        {
            "row": 7,
            "title": "Top-10 of the whole catalogue (Amazon Beauty, 12,101 items), a Llama of 260 k parameters",
            "against": "Hugging Face `generate`, beam 10 constrained by a prefix trie, same language model and users",
            "target": "≥ 100× users/s",
            "reached": all(case["ratio"]["median"] >= 100 for case in cases),
            "cases": cases,
            "where": {name: shares(lambda name=name: sides[name](0)) for name in runs},
        },
    )


def flops_of(run: FinishedRun, users: np.ndarray) -> float:
    """Two for each parameter and token of the prompts that it reads, and the products with all items."""
    batch = run.builder.recommending(users, run.shown.take(users), "test", 1)
    parameters = sum(p.numel() for name, p in run.model.backbone.named_parameters() if "embed" not in name)
    tokens = int((batch.symbols >= 0).sum())
    spared = run.model.backbone.asked_parameters * (tokens - len(users))
    products = len(users) * run.store.num_items * run.model.nodes.width
    return 2 * (parameters * tokens - spared + products)


def finished(job: str) -> Path:
    """The folder of a run with the small Llama that has ended without a step: lists take as long."""
    backbone = Path(os.environ["RAYGREC_DATA"]) / "stories260k"
    settings = [FEW, f"backbone.name={backbone}", "backbone.layers=null"]
    config = with_absolute_paths(job_config(job, beauty(), f"topk-{Path(job).stem}", *settings))
    shutil.rmtree(config.out, ignore_errors=True)
    folder = RunFolder(config.out)
    folder.start(config, resume=False)
    one = ready(job, beauty(), f"topk-{Path(job).stem}", *settings)
    trained = {name: p.detach() for name, p in one.model.named_parameters() if p.requires_grad}
    save_model(one.config, folder, trained)
    folder.write_metrics({"store": Store.open(one.config.store).fingerprint})
    return folder.path


def part(users: np.ndarray, number: int, count: int) -> np.ndarray:
    """The first `count` users of a round: each side has the same ones."""
    start = (number % ROUNDS) * USERS
    return users[start : start + count]


def titles(run: FinishedRun) -> list[Tokens]:
    rows = run.store.tokens(run.config.backbone.name).titles
    return [rows[item][:TITLE].tolist() for item in range(len(rows))]


def ids(run: FinishedRun) -> list[Tokens]:
    places = BASE ** np.arange(DIGITS)
    return (FIRST_DIGIT + np.arange(run.store.num_items)[:, None] // places % BASE).tolist()


def generator(run: FinishedRun, kind: str, names: list[Tokens], users: np.ndarray) -> Callable[[int], list[Tokens]]:
    """Beam search that can only spell an item."""
    folder = run.config.backbone.name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token_id
    trie: dict[int, dict] = {}
    for name in names:
        place = trie
        for token in name:
            place = place.setdefault(token, {})
        place[end] = {}
    lead, ask = (tokenizer.encode(text, add_special_tokens=False) for text in ("history:", "; next:"))
    count, length = (SHOWN_TITLES, SHOWN_TITLE) if kind == "titles" else (SHOWN_IDS, DIGITS)
    longest = max(map(len, names))

    def prompt(user: int) -> Tokens:
        shown = [token for item in run.shown[user][-count:] for token in names[int(item)][:length]]
        return [tokenizer.bos_token_id, *lead, *shown, *ask]

    def generate(number: int) -> list[Tokens]:
        prompts = [prompt(int(user)) for user in part(users, number, GENERATED)]
        width = max(map(len, prompts))
        read = torch.full((len(prompts), width), end)
        mask = torch.zeros_like(read)
        for row, tokens in enumerate(prompts):
            read[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = 1

        def allowed(_: int, written: torch.Tensor) -> Tokens:
            place = trie
            for token in written[width:].tolist():
                place = place.get(token, {})
            return list(place) or [end]

        with torch.inference_mode():
            found = model.generate(
                input_ids=read,
                attention_mask=mask,
                max_new_tokens=longest + 1,
                num_beams=K,
                num_return_sequences=K,
                do_sample=False,
                prefix_allowed_tokens_fn=allowed,
                pad_token_id=end,
                eos_token_id=end,
            )
        return found[:, width:].tolist()

    return generate
