"""Row 11: training steps around Llamas of 1 B and 7 B parameters on a GPU, against Hugging Face's Trainer there.

Weights are random, prompts those of the demo's made-up bookshop in MiniLM's tokens, with titles and all positions of a
history answered: no data and no network. Where torch sees no GPU, the same is rehearsed with a Llama of two thin
layers, and nothing is written.
"""

import gc
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bench.quality import WORK, demo_store
from bench.speed.measure import FLOPS, MATMUL, compared, in_turns, spread, write
from bench.speed.ready import FEW, ready
from bench.speed.step import ALONE, OURS, TRAINER, Glued, Steps
from raygrec.model.backbone import load_tokenizer
from raygrec.ranks import device
from raygrec.train.accelerators import ACCELERATORS
from raygrec.train.engine import make_engine

ROUNDS = 5
PRODUCT = "bf16 product"
SHAPES = {  # width, inner width, layers, heads, of keys
    "1 B": (2048, 8192, 16, 32, 8),
    "7 B": (4096, 11008, 32, 32, 32),
    "rehearsal": (64, 128, 2, 4, 2),
}
OFFLOADED = ("engine.zero_stage=3", "engine.offload_optimizer=true", "engine.offload_parameters=true")
CHECKPOINTED = "engine.activation_checkpointing=true"
CASES: dict[str, tuple[str, int, list[str]]] = {  # shape, users an update, settings
    "1 B, all weights": ("1 B", 128, []),
    "1 B, LoRA": ("1 B", 128, ["model.tuning=lora"]),
    "7 B, LoRA": ("7 B", 32, ["model.tuning=lora", CHECKPOINTED]),
    "1 B, all weights, ZeRO-3 with all offloaded": ("1 B", 128, [*OFFLOADED]),
    "7 B, LoRA, ZeRO-3 with all offloaded": ("7 B", 32, ["model.tuning=lora", *OFFLOADED, CHECKPOINTED]),
}
REHEARSED = {
    "all weights": ("rehearsal", 16, []),
    "LoRA": ("rehearsal", 16, ["model.tuning=lora", CHECKPOINTED]),
    "all weights, ZeRO-3 with all offloaded": ("rehearsal", 16, [*OFFLOADED]),
    "LoRA, ZeRO-3 with all offloaded": ("rehearsal", 16, ["model.tuning=lora", *OFFLOADED, CHECKPOINTED]),
}
SETTINGS = [
    *(FEW, "graph.folds=0", "graph.dim=64", *ALONE, "model.contrast.momentum=null"),
    *("model.text_vectors=false", "model.title_tokens=16", "model.layer_dropout=0"),
    *("backbone.layers=null", "backbone.pretrained=false", "engine.precision=bf16"),
]


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's about DeepSpeed's calls
    on_gpu = device().type == "cuda"
    cases: list[dict[str, Any]] = []
    for name, (shape, users, settings) in (CASES if on_gpu else REHEARSED).items():
        try:
            cases.append(measured(name, shape, users, settings))
        except torch.OutOfMemoryError:
            print(f"{name}: does not fit on this GPU")
        gc.collect()
        torch.cuda.empty_cache()
        if on_gpu and cases:
            told(cases)  # a row that is cut off has what it had
    if not on_gpu:
        print(json.dumps(cases, indent=1))
        print("Row 11 is of GPUs, and torch sees none: this was a rehearsal, nothing is written.")


def told(cases: list[dict[str, Any]]) -> None:
    mfu = cases[0].get("mfu", {"median": 0.0})["median"]
    faster = [case["ratio"]["median"] for case in cases if case["theirs"]["name"] == TRAINER]
    write(
        "gpu",
        {
            "row": 11,
            "title": "Training steps of GAL-Rec (L0) around Llamas with random weights on a GPU, bf16",
            "against": "Hugging Face's Trainer on the same prompts in random order, padded, with nodes as new words "
            "and one linear layer to all items; floor: 6 operations a parameter of the language model and real "
            "token, 4 with adapters, the last layer's at answers alone, none for attention scores or what is computed "
            "again, at the rate of a bf16 product on this GPU; MFU: the same at the rate of its datasheet",
            "target": "≥ 45 % MFU at 1 B; ≥ 1.3× Trainer",
            "reached": len(cases) == len(CASES) and mfu >= 0.45 and min(faster) >= 1.3,
            "cases": cases,
            "clock": "wall clock",
        },
        *("accelerate", "deepspeed", "peft"),
    )


def measured(name: str, shape: str, users: int, settings: list[str]) -> dict[str, Any]:
    """Steps of one way to tune one shape, ours and the Trainer's in turns."""
    spread_out = any(setting.startswith("engine.zero_stage") for setting in settings)
    given = [*SETTINGS, f"backbone.name={llama(shape)}", f"train.batch={users}", f"train.micro_batch={users}"]
    if spread_out:
        join_a_group()
    one = ready("galrec.yaml", demo_store(), f"gpu-{shape}".replace(" ", ""), *given, *settings, distributed=spread_out)
    engine = make_engine(one.model, one.config.engine, 1, spread_out)
    steps = Steps(one, engine, now)
    product, flops = a_product()
    sides: dict[str, Callable[[int], object]] = {OURS: steps.ours, PRODUCT: product}
    if not spread_out:  # the Trainer's model would stand beside what is too large for the GPU
        sides[TRAINER] = Glued(steps).steps
    seconds = in_turns(sides, ROUNDS, before=steps.draw, clock=now)
    seconds[MATMUL] = [taken * FLOPS / flops for taken in seconds[PRODUCT]]
    tokens = {side: np.array(steps.tokens[side][1:]) for side in steps.tokens if side in sides}  # rounds differ by half
    mean = {side: float(found.mean()) for side, found in tokens.items()}
    for side, found in tokens.items():
        seconds[side] = (np.array(seconds[side]) * mean[side] / found).tolist()
    needed = operations(steps, mean[OURS], one.config)
    other = TRAINER if TRAINER in sides else OURS
    case = compared(name, seconds, OURS, other, flops=needed, work=mean, unit="tokens/s")
    peak = datasheet_rate()
    if peak:
        case["mfu"] = spread(needed / np.array(seconds[OURS]) / peak)
    share = f"{case['mfu']['median']:.1%} of the datasheet's {peak / 1e12:.0f} TFLOP/s; " if peak else ""
    padding = "; ".join(f"{side} {1 - sum(steps.tokens[side]) / sum(steps.places[side]):.1%}" for side in tokens)
    case["note"] = f"{share}{mean[OURS]:,.0f} tokens a round of {len(steps.order)} updates; padding: {padding}"
    return case


def operations(steps: Steps, tokens: float, config: Any) -> float:
    """Of the language model's matrices for so many tokens: forward, backward, and gradients of weights that have any.

    Answers are as many a token as in the newest round.
    """
    backbone = steps.backbone
    size = {name: getattr(p, "ds_numel", p.numel()) for name, p in backbone.model.named_parameters()}
    table = backbone.model.get_input_embeddings().weight
    whole = sum(size.values()) - getattr(table, "ds_numel", table.numel())
    asked = backbone.asked_parameters
    answers = sum(len(call[-1].rows_n) for _, call in steps.given) / steps.tokens[OURS][-1]
    return (4 if config.model.tuning == "lora" else 6) * tokens * (whole - asked + asked * answers)


def now() -> float:
    """Seconds of the wall clock, after all that the GPU was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def a_product() -> tuple[Callable[[int], None], float]:
    """A matrix product as fast as this device has them, and its operations."""
    side, times = (8192, 10) if torch.cuda.is_available() else (512, 10)
    left = torch.randn(side, side, device=device(), dtype=torch.bfloat16)

    def product(_: int) -> None:
        for _ in range(times):
            left @ left

    return product, times * 2.0 * side**3


def datasheet_rate() -> float | None:
    """FLOP/s in bf16 of this GPU, where `raygrec plan` knows it, and not of a slower card of the same name."""
    words = torch.cuda.get_device_name().replace("-", " ").split() if torch.cuda.is_available() else []
    if {"PCIe", "NVL"} & set(words):
        return None
    return next((one.rate("bf16") for known, one in ACCELERATORS.items() if known.split("-")[0] in words), None)


def llama(shape: str) -> Path:
    """A folder with the config of that shape and MiniLM's tokenizer."""
    from transformers import LlamaConfig

    width, inner, layers, heads, keys = SHAPES[shape]
    folder = WORK / "shapes" / shape.replace(" ", "")
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = load_tokenizer("minilm")
    tokenizer.save_pretrained(folder)
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    return folder


def join_a_group() -> None:
    """A process group of this process alone, which DeepSpeed asks for and keeps."""
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
