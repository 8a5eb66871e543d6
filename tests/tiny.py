"""A tiny data set and a tiny backbone, made in a second."""

from pathlib import Path
from typing import Any

SUBJECTS = ("cats", "dogs", "trains", "ships")


def make_store(folder: Path, split: str = "leave-one-out") -> Any:
    """48 users, 24 items in four tastes, as an open store in `folder`/store."""
    from raygrec.data.options import PrepareOptions
    from raygrec.data.prepare import prepare

    items = [f"i{number},The {SUBJECTS[number % 4]} book {number},{SUBJECTS[number % 4]}" for number in range(24)]
    rows = [
        f"u{user},i{(user % 4 + 4 * (user // 4 + step)) % 24},{step}"
        for user in range(48)
        for step in range(4 + user % 3)
    ]
    (folder / "interactions.csv").write_text("user,item,time\n" + "\n".join(rows) + "\n")
    (folder / "items.csv").write_text("item,title,categories\n" + "\n".join(items) + "\n")
    return prepare(PrepareOptions(format="table", path=folder, out=folder / "store", split=split, k_core=0))


def make_backbone(folder: Path) -> Path:
    """A two-layer random BERT with a word-piece tokenizer, in `transformers` format in `folder`, which it returns."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

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
