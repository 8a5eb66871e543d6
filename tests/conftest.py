"""Fixtures that several rooms share: a tiny data set, a tiny backbone, quiet bars."""

import os
from pathlib import Path

# Before torch is imported, and for the processes that tests start: sums of one thread have one order.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

os.environ["RAYGREC_QUIET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)

SUBJECTS = ("cats", "dogs", "trains", "ships")


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory):
    """48 users, 24 items in four tastes, leave-one-out."""
    from raygrec.data.options import PrepareOptions
    from raygrec.data.prepare import prepare

    return prepare(PrepareOptions(**_tiny_source(tmp_path_factory, "leave-one-out"), k_core=0))


@pytest.fixture(scope="session")
def tiny_unordered_store(tmp_path_factory: pytest.TempPathFactory):
    """The same interactions, split per user at random."""
    from raygrec.data.options import PrepareOptions
    from raygrec.data.prepare import prepare

    return prepare(PrepareOptions(**_tiny_source(tmp_path_factory, "ratio"), k_core=0))


def _tiny_source(factory: pytest.TempPathFactory, split: str) -> dict[str, object]:
    folder: Path = factory.mktemp("tiny")
    items = [f"i{number},The {SUBJECTS[number % 4]} book {number},{SUBJECTS[number % 4]}" for number in range(24)]
    rows = [
        f"u{user},i{(user % 4 + 4 * (user // 4 + step)) % 24},{step}"
        for user in range(48)
        for step in range(4 + user % 3)
    ]
    (folder / "interactions.csv").write_text("user,item,time\n" + "\n".join(rows) + "\n")
    (folder / "items.csv").write_text("item,title,categories\n" + "\n".join(items) + "\n")
    return {"format": "table", "path": folder, "out": folder / "store", "split": split}


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer random BERT with a word-piece tokenizer, as a folder in `transformers` format."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("backbone")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789:;,."
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *("##" + letter for letter in letters), *SUBJECTS]
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    settings = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(settings).save_pretrained(folder)
    return folder
