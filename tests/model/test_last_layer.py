from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel

from raygrec.model.backbone import FAMILIES, Backbone, BackboneConfig, LoRAConfig
from raygrec.model.last_layer import Asked
from raygrec.model.prompts import Placed

LAYERS, T = 2, 7
KEYS = torch.tensor([11, 22, 33])
# The first prompt is asked for nothing, the others for differently many.
WANTED = torch.zeros(3, T, dtype=torch.bool)
WANTED[[1, 1, 1, 2], [0, 3, 6, 5]] = True
ASKED = Asked.of(WANTED)
NARROWED = ["bert", "roberta", "xlm-roberta", "llama", "qwen2", "qwen3", "mistral", "gemma"]
CASES = [
    (kind, attention)
    for kinds in FAMILIES.values()
    for kind in kinds
    for attention in ("sdpa", "eager")
    if attention == "eager" or kind not in ("gemma2", "mpnet", "t5", "mt5")  # which `transformers` refuses
]


def some_model(kind: str, folder: Path, attention: str = "sdpa") -> Backbone:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS, "head_dim": 4, "vocab_size": 60}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    named = {"d_model": 16, "d_ff": 24, "d_kv": 4, "num_layers": LAYERS, "num_heads": 4, "dim": 16, "hidden_dim": 24}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind in ("t5", "mt5", "distilbert"):
        sizes, heads = {"vocab_size": 60}, named | {"n_layers": LAYERS, "n_heads": 4}
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **sizes, **heads, **special))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return Backbone(BackboneConfig(name=str(folder), attention=attention)).double()


def given() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    embeds = torch.randn(3, T, 16, dtype=torch.float64).requires_grad_()
    return embeds, (torch.rand(3, T, T) < 0.6) | torch.eye(T, dtype=torch.bool)


def read(backbone: Backbone, asked: Asked | None, keys: torch.Tensor | None) -> list[torch.Tensor]:
    """Hidden states of `ASKED`, and gradients of what is given and of all that is trained."""
    embeds, mask = given()
    hidden = backbone(embeds, mask, keys, asked=asked)
    hidden = ASKED.among(hidden) if asked is None else hidden
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    (weights * hidden).sum().backward()
    grads = [p.grad for p in backbone.parameters() if p.requires_grad]
    backbone.zero_grad()
    return [hidden.detach(), embeds.grad, *(torch.zeros(()) if grad is None else grad for grad in grads)]


@pytest.mark.parametrize(("kind", "attention"), CASES)
def test_positions_that_are_asked_for_are_as_among_all(kind, attention, tmp_path):
    """With dropout of what layers add, whose masks follow from a position's place. Eager softmax may be in fp32."""
    backbone = some_model(kind, tmp_path, attention).tune().drop(0.3)
    whole, alone = (read(backbone, asked, KEYS) for asked in (None, ASKED))
    torch.testing.assert_close(alone, whole, atol=1e-5, rtol=1e-4)
    assert whole[1].abs().max() > 1e-3


@pytest.mark.parametrize("kind", NARROWED)
def test_the_last_layer_computes_nothing_else(kind, tmp_path):
    """Queries, what attention puts out, feed-forward network: of the first layer at every position."""
    backbone, rows = some_model(kind, tmp_path), {}
    parts = {
        "encoder": ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"),
        "decoder": ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"),
    }[backbone.family]
    layers = backbone.model.encoder.layer if backbone.family == "encoder" else backbone.model.layers
    for number, layer in enumerate(layers):
        for part in parts:
            layer.get_submodule(part).register_forward_hook(
                lambda _, read, __, place=(number, part): rows.update({place: read[0].shape[:-1].numel()})
            )
    backbone(*given(), asked=ASKED)
    assert rows == {(number, part): n for number, n in ((0, 3 * T), (1, len(ASKED.rows_n))) for part in parts}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", NARROWED)
def test_one_position_of_each_prompt(kind, attention, tmp_path):
    """As in serving; attention of single queries has ways of its own."""
    backbone, (embeds, mask) = some_model(kind, tmp_path, attention), given()
    one = Asked.of(torch.eye(T, dtype=torch.bool)[[2, 6, 0]])
    whole = backbone(embeds, mask)
    torch.testing.assert_close(backbone(embeds, mask, asked=one), one.among(whole), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_some_positions_of_prompts_that_begin_alike(kind, tmp_path):
    """Also such that a prompt but the first asks of the beginning they share."""
    backbone, (embeds, mask) = some_model(kind, tmp_path).freeze(), given()
    embeds = embeds.detach()
    embeds[:, :3] = embeds[0, :3].clone()
    asked, lengths = torch.tensor([T + 2, T + 6, 2 * T + 5]), torch.tensor([T, T, T])
    placed = Placed(embeds.flatten(0, 1), torch.arange(3 * T).view(3, T))
    expected = backbone.read(placed, mask.index_fill(2, torch.arange(3), True), lengths).at(asked)
    found = backbone.read(placed, mask.index_fill(2, torch.arange(3), True), lengths, prefix=3, asked=asked).at(asked)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("how", ["checkpointed", "adapted"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_also_where_layers_are_computed_again_or_have_adapters(kind, how, tmp_path):
    """Two reads before the backward pass, each with its own positions."""
    found = []
    for asked in (None, ASKED):
        backbone = some_model(kind, tmp_path)
        backbone = backbone.adapt(LoRAConfig(rank=2)).double() if how == "adapted" else backbone.tune()
        backbone.drop(0.3)
        torch.manual_seed(5)
        for name, parameter in backbone.named_parameters():
            if "lora_B" in name:  # which peft starts at zero
                torch.nn.init.normal_(parameter, std=0.3)
        if how == "checkpointed":
            backbone.checkpoint()
        embeds, mask = given()
        other = Asked.of(WANTED.roll(1, dims=1))
        parts = [
            backbone(embeds, mask, keys, asked=one) if asked else one.among(backbone(embeds, mask, keys))
            for keys, one in ((KEYS, ASKED), (KEYS + 1, other))
        ]
        (parts[0] - 2 * parts[1]).square().sum().backward()
        grads = [p.grad for p in backbone.parameters() if p.requires_grad and p.grad is not None]
        found.append([embeds.grad, *grads])
    torch.testing.assert_close(*found)


def test_a_later_read_without_positions_is_whole(tmp_path):
    backbone = some_model("bert", tmp_path)
    embeds, mask = given()
    before = backbone(embeds, mask)
    backbone(embeds, mask, asked=ASKED)
    assert torch.equal(backbone(embeds, mask), before)
    with pytest.raises(IndexError):
        backbone(embeds, mask, asked=replace(ASKED, columns_n=ASKED.columns_n + 1))
    assert torch.equal(backbone(embeds, mask), before)


def test_positions_by_hand():
    assert ASKED.rows_n.tolist() == [1, 1, 1, 2]
    assert ASKED.columns_n.tolist() == [0, 3, 6, 5]
    assert ASKED.ranks_n.tolist() == [0, 1, 2, 0]
    assert ASKED.most == 3
    none = Asked.of(torch.zeros(2, 3, dtype=torch.bool))
    assert (none.rows_n.tolist(), none.columns_n.tolist(), none.ranks_n.tolist(), none.most) == ([0], [0], [0], 1)


@pytest.mark.parametrize("kind", ["bert", "llama", "distilbert"])
def test_parameters_that_read_asked_positions_alone(kind, tmp_path):
    """Norm and bias included. BERT: 16² + 16 twice, 2 · 16 · 24 + 24 + 16, two norms of 2 · 16. Llama: 16² twice, three
    maps of 16 · 24, a norm of 16."""
    by_hand = {"bert": 2 * 272 + 768 + 24 + 16 + 64, "llama": 2 * 256 + 3 * 384 + 16, "distilbert": 0}
    assert some_model(kind, tmp_path).asked_parameters == by_hand[kind]
