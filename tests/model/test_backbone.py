import importlib.util
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, ElectraConfig, T5EncoderModel

from raygrec.errors import InputError
from raygrec.model.backbone import (
    FAMILIES,
    MINILM_PACKAGE,
    Backbone,
    BackboneConfig,
    LoRAConfig,
    generate,
    like_lengths,
    load_tokenizer,
    passes,
)
from raygrec.model.prompts import Placed
from tests.test_tensors import Evil

KINDS = {"bert": "encoder", "t5": "encoder-decoder", "llama": "decoder"}
ATTENTIONS = ["sdpa", "eager"]
SEGMENTS = torch.tensor([0, 0, 1, 1, 1, 2, 2])

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec(MINILM_PACKAGE) is None, reason="the extra raygrec[minilm] is not installed"
)
needs_data = pytest.mark.skipif("RAYGREC_DATA" not in os.environ, reason="RAYGREC_DATA is not set")


def stories() -> str:
    return str(Path(os.environ["RAYGREC_DATA"]) / "stories260k")


def everything(batch: int, length: int) -> torch.Tensor:
    return torch.ones(batch, length, length, dtype=torch.bool)


def block_causal(segments: torch.Tensor, batch: int) -> torch.Tensor:
    return (segments[:, None] >= segments[None, :]).expand(batch, -1, -1)


def assert_nothing_leaks(backbone: Backbone) -> None:
    """What stands in a later segment changes no earlier hidden state, and does change its own."""
    torch.manual_seed(1)
    embeds = torch.randn(2, len(SEGMENTS), backbone.width)
    mask = block_causal(SEGMENTS, 2)
    with torch.no_grad():
        before = backbone(embeds, mask)
        for segment in (1, 2):
            changed = embeds.clone()
            changed[:, segment <= SEGMENTS] = torch.randn(2, int((segment <= SEGMENTS).sum()), backbone.width)
            after = backbone(changed, mask)
            assert torch.equal(before[:, segment > SEGMENTS], after[:, segment > SEGMENTS])
            assert (before - after)[:, segment <= SEGMENTS].abs().amax(-1).min() > 1e-3


def assert_padding_changes_nothing(backbone: Backbone) -> None:
    torch.manual_seed(2)
    lengths, longest = [3, 7, 5], 7
    embeds = torch.randn(len(lengths), longest, backbone.width)
    shown = torch.arange(longest) < torch.tensor(lengths)[:, None]
    mask = shown[:, None, :] | torch.eye(longest, dtype=torch.bool)
    with torch.no_grad():
        together = backbone(embeds, mask)
        for row, length in enumerate(lengths):
            alone = backbone(embeds[row : row + 1, :length], everything(1, length))[0]
            torch.testing.assert_close(together[row, :length], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_family_width_and_vocabulary(kind, backbone_folder):
    backbone = Backbone(BackboneConfig(name=backbone_folder(kind)))
    assert (backbone.family, backbone.width, backbone.vocabulary) == (KINDS[kind], 16, 60)
    table = backbone.model.get_input_embeddings().weight
    ids = torch.tensor([[3, 4], [59, 0]])
    assert torch.equal(backbone.embed(ids), table[ids])


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_later_segment_leaks_nothing(kind, attention, backbone_folder):
    assert_nothing_leaks(Backbone(BackboneConfig(name=backbone_folder(kind), attention=attention)))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind, attention, backbone_folder):
    assert_padding_changes_nothing(Backbone(BackboneConfig(name=backbone_folder(kind), attention=attention)))


@pytest.mark.parametrize("kind", KINDS)
def test_both_attentions_agree(kind, backbone_folder):
    torch.manual_seed(3)
    embeds = torch.randn(2, len(SEGMENTS), 16)
    sdpa, eager = (
        Backbone(BackboneConfig(name=backbone_folder(kind), attention=attention))(embeds, block_causal(SEGMENTS, 2))
        for attention in ATTENTIONS
    )
    torch.testing.assert_close(sdpa, eager, atol=1e-5, rtol=1e-5)


def test_a_decoder_stays_causal_inside_a_segment(backbone_folder):
    backbone = Backbone(BackboneConfig(name=backbone_folder("llama")))
    embeds = torch.randn(1, 5, 16)
    changed = embeds.clone()
    changed[:, 3] = torch.randn(16)
    before, after = (backbone(e, everything(1, 5)) for e in (embeds, changed))
    assert torch.equal(before[:, :3], after[:, :3])


@pytest.mark.parametrize("kind", KINDS)
def test_first_layers_are_those_of_the_whole_model(kind, backbone_folder):
    folder = backbone_folder(kind)
    ids = torch.tensor([[5, 8, 2, 40], [7, 7, 1, 9]])
    whole = (T5EncoderModel if kind == "t5" else AutoModel).from_pretrained(folder)
    final = {
        "bert": lambda h: h,
        "t5": lambda h: whole.encoder.final_layer_norm(h),
        "llama": lambda h: whole.norm(h),
    }
    with torch.no_grad():
        output = whole(input_ids=ids, output_hidden_states=True)
        for layers in (1, 2, 3, None):
            backbone = Backbone(BackboneConfig(name=folder, layers=layers))
            expected = output.last_hidden_state if layers in (3, None) else final[kind](output.hidden_states[layers])
            hidden = backbone(backbone.embed(ids), everything(2, 4))
            torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_are_not_there(kind, layers, backbone_folder):
    with pytest.raises(InputError, match=rf"key 'backbone.layers': {layers} given, '.*' has 3$"):
        Backbone(BackboneConfig(name=backbone_folder(kind), layers=layers))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_are_a_function_of_the_seed(kind, attention, backbone_folder, tmp_path):
    shutil.copytree(backbone_folder(kind), tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "dtype": "bfloat16"}))
    (tmp_path / "model.safetensors").unlink()
    config = BackboneConfig(name=str(tmp_path), pretrained=False, layers=2, attention=attention)
    backbones = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        backbones.append(Backbone(config))
    first, same, other = (torch.cat([p.flatten() for p in b.parameters()]) for b in backbones)
    assert first.dtype == torch.float32
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert backbones[0].model.config._attn_implementation == attention


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_embeddings_and_not_a_frozen_backbone(kind, backbone_folder):
    backbone = Backbone(BackboneConfig(name=backbone_folder(kind))).freeze()
    embeds = torch.randn(1, 4, 16, requires_grad=True)
    backbone(embeds, everything(1, 4)).square().sum().backward()
    assert embeds.grad.abs().min() > 0
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())


def adapted(folder: str, config: LoRAConfig, **more: object) -> Backbone:
    """A backbone whose adapters are far from their start."""
    torch.manual_seed(5)
    backbone = Backbone(BackboneConfig(name=folder, **more)).adapt(config)
    for name, parameter in backbone.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return backbone


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_add_a_low_rank_product_to_every_linear_layer(kind, backbone_folder):
    folder = backbone_folder(kind)
    plain = Backbone(BackboneConfig(name=folder, layers=2))
    embeds, mask = torch.randn(2, len(SEGMENTS), 16), block_causal(SEGMENTS, 2)
    with torch.no_grad():
        before = plain(embeds, mask)
        fresh = Backbone(BackboneConfig(name=folder, layers=2)).adapt(LoRAConfig(rank=3, alpha=6.0))
        assert torch.equal(fresh.train()(embeds, mask), before)  # an adapter starts as nothing
        backbone = adapted(folder, LoRAConfig(rank=3, alpha=6.0), layers=2)
        linear = [name for name, module in plain.model.named_modules() if isinstance(module, torch.nn.Linear)]
        for name in linear:
            module = backbone.model.get_submodule(name)
            a, b = (getattr(module, part)["default"].weight for part in ("lora_A", "lora_B"))
            assert (len(a), b.shape[1]) == (3, 3)
            plain.model.get_submodule(name).weight += 6.0 / 3 * b @ a
        after = backbone.train()(embeds, mask)
        torch.testing.assert_close(after, plain(embeds, mask), atol=1e-4, rtol=1e-4)
    assert (after - before).abs().max() > 0.1
    trained = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert trained == {f"model.{name}.lora_{part}.default.weight" for name in linear for part in "AB"}


def test_adapters_of_the_named_layers_only(backbone_folder):
    backbone = adapted(backbone_folder("bert"), LoRAConfig(target_modules=("query", "value")))
    trained = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    assert len(trained) == 3 * 2 * 2
    assert all(".query." in name or ".value." in name for name in trained)
    with pytest.raises(InputError, match=r"^key 'model.lora.target_modules': .*nope.* not found in the base model"):
        adapted(backbone_folder("bert"), LoRAConfig(target_modules=("nope",)))


def test_adapters_of_untrained_weights_all_have_something_to_do(backbone_folder):
    """A pooling layer, which nothing reads, would have adapters that get no gradient."""
    backbone = adapted(backbone_folder("bert"), LoRAConfig(), pretrained=False)
    backbone(torch.randn(1, 4, 16), everything(1, 4)).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in backbone.parameters() if p.requires_grad)


@pytest.mark.parametrize("adapters", [False, True], ids=["plain", "adapters"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_a_plain_model_of_the_kept_layers(kind, adapters, backbone_folder, tmp_path):
    folder = backbone_folder(kind)
    config = BackboneConfig(name=folder, layers=2)
    backbone = adapted(folder, LoRAConfig(rank=3), layers=2) if adapters else Backbone(config)
    embeds, mask = torch.randn(2, len(SEGMENTS), 16), block_causal(SEGMENTS, 2)
    with torch.no_grad():
        expected = backbone(embeds, mask)
        backbone.save(tmp_path)
        torch.testing.assert_close(backbone(embeds, mask), expected, atol=1e-5, rtol=1e-5)  # merged, and still of use
        again = Backbone(BackboneConfig(name=str(tmp_path)))
        torch.testing.assert_close(again(embeds, mask), expected, atol=1e-5, rtol=1e-5)
    assert again.model.config.num_hidden_layers == 2
    assert again.state_dict().keys() == Backbone(config).state_dict().keys()


def test_adapters_without_peft(backbone_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it raises ImportError
    with pytest.raises(InputError, match=r"needs the package peft: pip install 'raygrec\[lora\]'$"):
        Backbone(BackboneConfig(name=backbone_folder("bert"))).adapt(LoRAConfig())


@pytest.mark.parametrize("kind", KINDS)
def test_training_mode_is_deterministic_and_checkpointing_changes_no_gradient(kind, backbone_folder):
    """The saved models have dropout 0.5, which must be off: `train()` is what turns checkpointing on."""
    backbone = Backbone(BackboneConfig(name=backbone_folder(kind))).freeze()
    torch.manual_seed(4)
    embeds = torch.randn(2, len(SEGMENTS), 16)
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            backbone.checkpoint()
        leaf = embeds.clone().requires_grad_()
        hidden = backbone(leaf, block_causal(SEGMENTS, 2))
        hidden.square().sum().backward()
        results.append((hidden.detach(), leaf.grad))
    torch.testing.assert_close(*results)
    assert backbone.model.training


KEYS = torch.tensor([11, 22])


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_of_layers_follows_keys_and_scales_what_they_add(kind, backbone_folder):
    torch.manual_seed(4)
    embeds, mask = torch.randn(2, len(SEGMENTS), 16), block_causal(SEGMENTS, 2)
    plain = Backbone(BackboneConfig(name=backbone_folder(kind))).freeze()(embeds, mask)
    backbone = Backbone(BackboneConfig(name=backbone_folder(kind))).freeze().drop(0.4)
    assert torch.equal(backbone(embeds, mask), plain)
    dropped = backbone(embeds, mask, KEYS)
    assert not torch.allclose(dropped, plain, atol=0.01)
    assert torch.equal(backbone(embeds, mask, KEYS), dropped)
    torch.testing.assert_close(backbone(embeds[1:], mask[1:], KEYS[1:]), dropped[1:])
    assert not torch.allclose(backbone(embeds[1:], mask[1:], KEYS[:1]), dropped[1:], atol=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_computed_again_drop_what_they_dropped(kind, backbone_folder):
    """Two calls before the backward pass, each with its own keys."""
    mask, results = block_causal(SEGMENTS, 2), []
    for checkpointed in (False, True):
        backbone = Backbone(BackboneConfig(name=backbone_folder(kind))).freeze().drop(0.4)
        if checkpointed:
            backbone.checkpoint()
        torch.manual_seed(4)
        leaf = torch.randn(2, len(SEGMENTS), 16).requires_grad_()
        (backbone(leaf, mask, KEYS) - 2 * backbone(leaf, mask, KEYS + 1)).square().sum().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results)


def test_a_dropped_llama_by_hand(backbone_folder):
    """A layer adds what attention and feed-forward network put out: some of it zero, the rest divided by 0.6."""
    backbone = Backbone(BackboneConfig(name=backbone_folder("llama"), layers=1)).freeze().drop(0.4)
    seen = {}
    layer = backbone.model.layers[0]
    for name, module in (("attention", layer.self_attn.o_proj), ("feed-forward", layer.mlp.down_proj)):
        module.register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: (module, inputs[0], output)})
        )
    backbone(torch.randn(2, len(SEGMENTS), 16), block_causal(SEGMENTS, 2), KEYS)
    masks = []
    for module, given, output in seen.values():
        full = torch.nn.functional.linear(given, module.weight)
        masks.append(output != 0)
        torch.testing.assert_close(output, torch.where(masks[-1], full / 0.6, 0.0))
    assert 0.45 < torch.cat(masks).double().mean() < 0.75
    assert not torch.equal(*masks)


@pytest.mark.parametrize("seed", range(20))
def test_groups_of_like_length_have_the_least_padding(seed):
    """Against every way to cut the sorted lengths."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 7, generator.integers(1, 9)).tolist()
    most = int(generator.integers(1, 5))
    groups = like_lengths(lengths, most)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    assert len(groups) <= most and all(groups)
    ordered, count = sorted(lengths), len(lengths)
    ways = (cuts for parts in range(most) for cuts in itertools.combinations(range(1, count), parts))
    least = min(
        sum((end - start) * ordered[end - 1] for start, end in itertools.pairwise((0, *c, count))) for c in ways
    )
    assert sum(len(group) * max(lengths[row] for row in group) for group in groups) == least


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_prompt_longer_than_the_model_reads_is_refused_in_one_line(kind, backbone_folder):
    backbone = Backbone(BackboneConfig(name=backbone_folder(kind)))
    longest = backbone.model.config.max_position_embeddings
    for length in (longest, longest + 1):
        given = torch.zeros(1, length, 16), torch.ones(1, length, length, dtype=torch.bool)
        if length == longest:
            assert backbone(*given).shape == (1, length, 16)
            continue
        with pytest.raises(InputError, match=f"a prompt of {length} tokens, and the backbone reads {longest}"):
            backbone(*given)


def placed(embeds: torch.Tensor) -> Placed:
    return Placed(embeds.flatten(0, 1), torch.arange(embeds.shape[:2].numel()).view(embeds.shape[:2]))


@pytest.mark.parametrize("partitioned", [False, True], ids=["whole", "ZeRO-3"])
@pytest.mark.parametrize("longest", [3, 12])
def test_prompts_of_like_length_are_read_together_with_the_same_result(longest, partitioned, backbone_folder):
    """Parameters that DeepSpeed has partitioned have an id. Gradients are the same, too, and reach every pass."""
    backbone = Backbone(BackboneConfig(name=backbone_folder("bert"), layers=2)).freeze().drop(0.3)
    read_places = []
    backbone.register_forward_pre_hook(lambda _, given: read_places.append(given[0].shape[:2].numel()))
    if partitioned:
        next(backbone.parameters()).ds_id = 0
    torch.manual_seed(8)
    lengths, keys = torch.randint(3, longest + 1, (50,)), torch.arange(50)
    shown = torch.arange(12) < lengths[:, None]
    mask = shown[:, None, :] | torch.eye(12, dtype=torch.bool)
    results = []
    for read in (
        lambda embeds: backbone(embeds, mask, keys),
        lambda embeds: backbone.read(placed(embeds), mask, lengths, keys).padded(),
    ):
        embeds = torch.randn(50, 12, 16, generator=torch.Generator().manual_seed(3)).requires_grad_()
        hidden = read(embeds)[shown]
        hidden.square().sum().backward()
        results.append((hidden.detach(), embeds.grad[shown]))
    torch.testing.assert_close(*results)
    expected = passes(lengths, backbone)
    assert read_places[1:] == [max(len(rows), 1) * width for rows, width in expected]
    assert len(expected) == (2 if partitioned else 1 if longest == 3 else 3)
    assert sum(len(rows) * width for rows, width in expected) < (1.1 if longest == 3 else 1.3) * lengths.sum()


PREFIX = 4
DECODERS = [
    (kind, attention)
    for kind in FAMILIES["decoder"]
    for attention in ATTENTIONS
    if (kind, attention) != ("gemma2", "sdpa")  # which `transformers` refuses
]


def some_decoder(kind: str, folder: Path) -> str:
    """With random weights, and sliding windows where it has them."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 60}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 3, "max_position_embeddings": 64}
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = AutoModel.from_config(AutoConfig.for_model(kind, **sizes, **heads, **special))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return str(folder)


def read_prompts(
    backbone: Backbone, prefix: int, lengths: torch.Tensor, keys: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
    """Hidden states of prompts that begin alike and then see some of what is before, gradients, shapes of passes."""
    places = torch.arange(lengths.max())
    shown = places < lengths[:, None]
    torch.manual_seed(3)
    mask = everything(len(lengths), len(places)) & shown[:, None, :]
    mask[:, PREFIX:] &= torch.rand(mask[:, PREFIX:].shape) < 0.6
    mask |= torch.eye(len(places), dtype=torch.bool)
    embeds = torch.randn(len(lengths), len(places), 16, dtype=next(backbone.parameters()).dtype)
    embeds[:, :PREFIX] = embeds[0, :PREFIX].clone()
    embeds.requires_grad_()
    passes: list[tuple[int, int]] = []
    hook = backbone.register_forward_pre_hook(lambda _, given: passes.append(tuple(given[0].shape[:2])))
    hidden = backbone.read(placed(embeds), mask, lengths, keys, prefix).padded()[shown]
    hidden.square().sum().backward()
    hook.remove()
    return hidden.detach(), embeds.grad, passes


@pytest.mark.parametrize(("kind", "attention"), DECODERS)
def test_a_shared_prefix_is_read_once_with_the_same_result(kind, attention, tmp_path):
    """Some prompts are nothing else. Eager attention takes its softmax in fp32."""
    backbone = Backbone(BackboneConfig(name=some_decoder(kind, tmp_path), attention=attention)).freeze().double()
    lengths = torch.randint(PREFIX, 11, (50,), generator=torch.Generator().manual_seed(8))
    nothing_else = torch.tensor([PREFIX, PREFIX])
    *_, passes = read_prompts(backbone, 0, lengths)
    for some, expected in (
        (lengths, [(1, PREFIX), *((rows, max(width - PREFIX, 1)) for rows, width in passes)]),
        (nothing_else, [(1, PREFIX - 1), (2, 1)]),
    ):
        whole, shared = (read_prompts(backbone, prefix, some) for prefix in (0, PREFIX))
        torch.testing.assert_close(shared[0], whole[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(shared[1][:, PREFIX:], whole[1][:, PREFIX:], atol=1e-5, rtol=1e-4)
        assert not shared[1][:, : PREFIX - 1].any()
        assert shared[2] == expected


def test_every_rank_makes_as_many_passes_with_a_prefix(backbone_folder):
    backbone = Backbone(BackboneConfig(name=backbone_folder("llama"))).freeze()
    next(backbone.parameters()).ds_id = 0
    assert read_prompts(backbone, PREFIX, torch.tensor([6, 6, 6]))[2] == [(1, PREFIX), (3, 2), (1, 1)]
    assert read_prompts(backbone, PREFIX, torch.tensor([6, 9]))[2] == [(1, PREFIX), (1, 2), (1, 5)]


@pytest.mark.parametrize("why", ["encoder", "trained", "dropout", "checkpointing"])
def test_prompts_are_read_whole_where_their_prefix_cannot_be_shared(why, backbone_folder):
    backbone = Backbone(BackboneConfig(name=backbone_folder("bert" if why == "encoder" else "llama"))).freeze()
    keys = torch.arange(3) if why == "dropout" else None
    if why == "trained":
        backbone.tune()
    expected = read_prompts(backbone.drop(0.3), 0, torch.tensor([5, 7, 10]), keys)
    if why == "checkpointing":
        backbone.checkpoint()
    found = read_prompts(backbone, PREFIX, torch.tensor([5, 7, 10]), keys)
    torch.testing.assert_close(found[:2], expected[:2])
    assert found[2] == expected[2] == [(3, 10)]


def test_names_that_are_no_backbone(tmp_path):
    missing = str(tmp_path / "missing")
    for call in (lambda: Backbone(BackboneConfig(name=missing)), lambda: load_tokenizer(missing)):
        with pytest.raises(InputError) as error:
            call()
        assert str(error.value).startswith(f"backbone '{missing}': no such folder or model")
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="no such folder or model"):
        generate(missing, [[1]], 1)


def test_a_model_type_whose_masks_nobody_checked_is_refused(tmp_path):
    ElectraConfig(vocab_size=10, hidden_size=8, num_attention_heads=1).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"is of type 'electra'; expected one of bert, .*, llama"):
        Backbone(BackboneConfig(name=str(tmp_path), pretrained=False))


def test_weights_that_cannot_be_read(backbone_folder, tmp_path):
    shutil.copytree(backbone_folder("bert"), tmp_path, dirs_exist_ok=True)
    for damage in (lambda file: file.write_bytes(b"\x08" + bytes(30)), lambda file: file.unlink()):
        damage(tmp_path / "model.safetensors")
        with pytest.raises(InputError, match=r"^backbone '.*' with attention 'sdpa' does not load: .+$"):
            Backbone(BackboneConfig(name=str(tmp_path)))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("dump", [torch.save, lambda evil, file: file.write_bytes(pickle.dumps(evil))])
def test_a_pickle_among_the_weights_is_not_executed(tiny_backbone, tmp_path, name, dump):
    folder, mark = tmp_path / "folder", tmp_path / "executed"
    shutil.copytree(tiny_backbone, folder)
    (folder / "model.safetensors").unlink()
    dump(Evil(mark), folder / name)
    with pytest.raises(InputError, match=r"^backbone '.*' .*does not load: .+$"):
        Backbone(BackboneConfig(name=str(folder)))
    assert not mark.exists()


def test_code_beside_the_weights_is_not_executed(tiny_backbone, tmp_path):
    folder, mark = tmp_path / "folder", tmp_path / "executed"
    shutil.copytree(tiny_backbone, folder)
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    for file, part in (("config.json", "AutoModel"), ("config.json", "AutoConfig")):
        content = json.loads((folder / file).read_text())
        content["auto_map"] = {**content.get("auto_map", {}), part: "evil.Evil"}
        (folder / file).write_text(json.dumps(content))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    Backbone(BackboneConfig(name=str(folder)))
    load_tokenizer(str(folder))
    assert not mark.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_which_some_are_missing(kind, backbone_folder, tmp_path):
    """`transformers` would fill them at random."""
    shutil.copytree(backbone_folder(kind), tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in sorted(weights) if "layer" in name and "decoder" not in name)
    save_file({n: w for n, w in weights.items() if n != name}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"does not load: its files lack '.*layer.*'$"):
        Backbone(BackboneConfig(name=str(tmp_path)))


def test_encoders_do_not_generate(backbone_folder):
    for kind in ("bert", "t5"):
        with pytest.raises(InputError, match=rf"\({kind}\) cannot generate: use model.texts.source=extracted"):
            generate(backbone_folder(kind), [[1, 2]], 3)


@needs_minilm
def test_minilm_is_itself_and_keeps_to_the_mask():
    backbone = Backbone(BackboneConfig(layers=2)).freeze()
    assert (backbone.family, backbone.width) == ("encoder", 384)
    folder = Path(importlib.util.find_spec(MINILM_PACKAGE).origin).parent / "model"
    ids = torch.tensor([load_tokenizer("minilm").encode("a blue whale sings")])
    with torch.no_grad():
        whole = AutoModel.from_pretrained(folder)(input_ids=ids, output_hidden_states=True)
        hidden = backbone(backbone.embed(ids), everything(1, ids.shape[1]))
    torch.testing.assert_close(hidden, whole.hidden_states[2], atol=1e-5, rtol=1e-4)
    assert_nothing_leaks(backbone)
    assert_padding_changes_nothing(backbone)


def assert_generates_as_the_model_alone(folder: str, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """In one batch (padded on the left), in several and alone; returns the continuations."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    length = {"min_new_tokens": tokens, "max_new_tokens": tokens}
    expected = [
        model.generate(torch.tensor([prompt]), do_sample=False, pad_token_id=0, **length)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    assert generate(folder, prompts, tokens) == expected
    assert generate(folder, prompts, tokens, batch_size=2) == expected
    assert generate(folder, prompts[1:2], tokens) == expected[1:2]
    return expected


def test_generation_does_not_depend_on_the_batch(backbone_folder):
    answers = assert_generates_as_the_model_alone(backbone_folder("llama"), [[5, 9, 30], [7], [8, 8, 41, 2, 17]], 6)
    assert len({tuple(answer) for answer in answers}) == 3


@pytest.mark.data
@needs_data
def test_generation_of_a_real_model():
    tokenizer = load_tokenizer(stories())
    texts = ["Once upon a time", "Lily", "The big red dog ran to the park and", "Tom saw a"]
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    answers = assert_generates_as_the_model_alone(stories(), prompts, 12)
    assert tokenizer.decode(answers[0]).strip().startswith(", there was")


@pytest.mark.data
@needs_data
def test_a_real_decoder_keeps_to_the_mask():
    backbone = Backbone(BackboneConfig(name=stories())).freeze()
    assert backbone.family == "decoder"
    assert_nothing_leaks(backbone)
    assert_padding_changes_nothing(backbone)


def test_what_reads_no_language_model_starts_without_transformers():
    """They take as long to import as torch; Ray starts several processes a trial."""
    code = "import sys, raygrec.cli, raygrec.train.pipeline; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
