"""Tiny language models with random weights, saved as `transformers` saves them."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 60


def _sizes(**more: object) -> dict[str, object]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        **more,
    }


def _model(kind: str) -> torch.nn.Module:
    if kind == "bert":
        return BertModel(BertConfig(**_sizes(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)))
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**_sizes(attention_dropout=0.5, num_key_value_heads=1)))
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=3,
            num_heads=2,
            dropout_rate=0.5,
            decoder_start_token_id=0,
        )
    )


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory):
    """kind -> the folder of a tiny bert, t5 or llama whose weights tell positions apart."""
    folders = {}

    def folder(kind: str) -> str:
        if kind not in folders:
            torch.manual_seed(0)
            model = _model(kind)
            for parameter in model.parameters():
                parameter.data = torch.randn_like(parameter) * 0.3
            folders[kind] = str(tmp_path_factory.mktemp(kind))
            model.save_pretrained(folders[kind])
        return folders[kind]

    return folder
