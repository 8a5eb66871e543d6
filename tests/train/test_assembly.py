import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from raygrec.data.arrays import CSR
from raygrec.data.prepare import PrepareOptions, prepare
from raygrec.draws import Draws
from raygrec.errors import InputError
from raygrec.evaluate.baselines import popularity_scores
from raygrec.evaluate.ranking import evaluate_scores
from raygrec.graph.lightgcn import NodeEmbeddings
from raygrec.model import text_vectors
from raygrec.model.backbone import Backbone, BackboneConfig
from raygrec.model.galrec import HOPS
from raygrec.model.glta import GLTA
from raygrec.model.successors import alike
from raygrec.model.trend import READING, Trend
from raygrec.serve.topk import evaluate_run
from raygrec.tensors import load_tensors
from raygrec.train.assembly import (
    TEXT_LENGTH,
    build_model,
    build_prompts,
    histories,
    load_model,
    prepare_only,
    prepare_run,
    truncated_to,
)
from raygrec.train.folder import RunFolder
from raygrec.train.local import train_here
from raygrec.train.settings import EvaluateConfig, run_config
from tests.tiny import make_store
from tests.train.workers import cut_here, tiny_config, tiny_galrec_config, tiny_graph_config, tiny_sequential_config

real_data = pytest.mark.skipif("RAYGREC_DATA" not in os.environ, reason="RAYGREC_DATA is not set")


def rows(csr: CSR) -> list[list[int]]:
    return [csr[row].tolist() for row in range(len(csr))]


def test_validation_reads_training_items_and_test_reads_both(tiny_store):
    train, valid, test = (rows(tiny_store.interactions(split)) for split in ("train", "valid", "test"))
    found = histories(tiny_store, "valid")
    assert (rows(found.shown), rows(found.targets)) == (train, valid)
    found = histories(tiny_store, "test")
    assert rows(found.shown) == [before + after for before, after in zip(train, valid, strict=True)]
    assert rows(found.targets) == test
    # Leave-one-out by hand: user 1 has five items, in the order of the source's times.
    assert len(train[1]) == 3
    assert tiny_store.item_ids[test[1][0]] == "i17"  # (1 % 4 + 4 * (1 // 4 + 4)) % 24


def test_the_first_entries_of_rows():
    found = truncated_to(CSR.from_lists([[5, 6, 7], [], [8]]), np.array([2, 0, 0]))
    assert rows(found) == [[5, 6], [], []]


def test_the_heads_texts_are_read_before_workers_start_and_only_where_they_are_asked_for(
    tiny_backbone, tmp_path, monkeypatch
):
    store = make_store(tmp_path)  # of which no other test has read the texts
    loads, load = [], text_vectors.Backbone
    monkeypatch.setattr(text_vectors, "Backbone", lambda config: loads.append(config) or load(config))

    def model_of(name: str, **model: object) -> GLTA:
        config = tiny_config(store.path, tiny_backbone, tmp_path / name, model=model)
        folder = RunFolder(config.out)
        with folder.claimed(config, resume=False):
            prepare_run(config, folder)
        read = len(loads)
        model = build_model(config, store, build_prompts(config, store, folder), folder, distributed=False)
        assert len(loads) == read
        return model

    without = model_of("without", text_vectors=False)
    assert (without.item_texts, without.head.rows.from_text, loads) == (None, None, [])
    found = model_of("with").item_texts
    assert len(loads) == 1
    tokens = store.tokens(str(tiny_backbone), TEXT_LENGTH).items
    config = BackboneConfig(name=str(tiny_backbone))
    texts = text_vectors.load_or_read_texts(config, tokens, tmp_path / "again")
    centred = texts - texts.mean(0)
    torch.testing.assert_close(found / found.norm(), centred / centred.norm())


@pytest.mark.parametrize("make", [tiny_galrec_config, tiny_sequential_config])
def test_a_run_keeps_the_texts_that_its_tuned_language_model_has_read(make, tiny_backbone, tmp_path):
    """Another reader, tuned on another machine or by other code, would make other vectors."""
    store = make_store(tmp_path)
    shared = {"text_vectors": True, "successors": {"alike": 3}}
    config = make(
        store.path, tiny_backbone, tmp_path / "run", model=shared, text_tuning={"updates": 3, "users": 8, "lr": 1e-3}
    )
    train_here(config)
    folder = RunFolder(config.out)
    (reader,) = (path for path in (store.path / "text_readers").iterdir() if path.is_dir())
    tokens = store.tokens(str(tiny_backbone), TEXT_LENGTH).items
    read = text_vectors.load_or_read_texts(BackboneConfig(name=str(reader)), tokens, tmp_path / "again")
    kept = load_tensors(folder.vectors_file)["items"]
    torch.testing.assert_close(kept, read)
    frozen = text_vectors.load_or_read_texts(BackboneConfig(name=str(tiny_backbone)), tokens, tmp_path / "again")
    assert (kept - frozen).abs().max() > 1e-3
    expected = evaluate_run(config.out)
    for made in ("text_readers", "text_vectors"):
        shutil.rmtree(store.path / made)
    assert evaluate_run(config.out) == expected
    assert not (store.path / "text_readers").exists()
    # Nothing but the kept vectors was read, for the prompts' likes too.
    _, builder = load_model(config, folder, store)
    shares = alike(kept, 3, 0.05).toarray()
    np.testing.assert_allclose(builder.successors._alike.toarray(), shares)


def test_texts_are_tuned_on_histories_in_the_order_of_time(tiny_unordered_store, tiny_backbone, tmp_path):
    config = tiny_config(tiny_unordered_store.path, tiny_backbone, tmp_path / "run", text_tuning={})
    with pytest.raises(InputError, match=r"GLTA \+ tuned texts reads histories in time order; prepare with"):
        prepare_only(config)
    assert not (tiny_unordered_store.path / "text_readers").exists()


# ---- every family of backbones, end to end


@pytest.fixture(scope="module")
def decoder(tiny_backbone, tmp_path_factory) -> Path:
    """A tiny random Llama with the tokenizer of the tiny BERT."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("decoder")
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder_decoder(tiny_backbone, tmp_path_factory) -> Path:
    """A tiny random T5 with the tokenizer of the tiny BERT."""
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("encoder-decoder")
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return folder


def assert_trained(config) -> None:
    folder = RunFolder(config.out)
    # Not the whole loss: contrastive terms grow while their queues fill.
    records = [record for record in folder.history() if record["stage"] == "train"]
    losses = [record.get("terms", {}).get("cross_entropy", record["loss"]) for record in records]
    assert losses[-1] < losses[0]
    assert np.isfinite(folder.metrics()["test"]["ndcg@3"])


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_families_end_to_end(tiny_store, tmp_path, family, request):
    config = tiny_config(tiny_store.path, request.getfixturevalue(family), tmp_path / "run", model={"head": "tied"})
    train_here(config)
    assert_trained(config)
    model, _ = load_model(config, RunFolder(config.out), tiny_store)
    assert model.backbone.family == family.replace("_", "-")


def test_unordered_histories_end_to_end(tiny_unordered_store, tiny_backbone, tmp_path):
    config = tiny_config(tiny_unordered_store.path, tiny_backbone, tmp_path / "run")
    train_here(config)
    assert_trained(config)
    assert {record["stage"] for record in RunFolder(config.out).history()} == {"alignment", "train"}


@pytest.mark.parametrize("order", [True, False], ids=["ordered", "sets"])
def test_a_store_split_in_time_with_its_trend_end_to_end(tiny_backbone, tmp_path, order):
    """What `raygrec evaluate` and `recommend` load ranks as the run has."""
    store = make_store(tmp_path, "global-time")
    config = tiny_config(store.path, tiny_backbone, tmp_path / "run", model={"trend": 0.3, "order": order})
    train_here(config)
    assert_trained(config)
    folder = RunFolder(config.out)
    stages = {record["stage"] for record in folder.history()}
    assert stages == ({"alignment", "histories", "train"} if order else {"alignment", "train"})
    metrics = folder.metrics()
    popular = ["Popularity", "Recent popularity"]
    assert list(metrics["baselines"]) == [*popular, "LightGCN", "LightGCN + recent popularity"]
    trend = Trend.of(store, 0.3)
    for split in ("valid", "test"):
        shown, targets = (getattr(histories(store, split), name) for name in ("shown", "targets"))
        scores = popularity_scores(trend.log_shares_MI[READING[split]])
        users = np.flatnonzero(targets.lengths)
        sums = evaluate_scores(scores, users, targets, [shown], store.num_items, config.evaluate.ks, progress=False)
        assert metrics["baselines"]["Recent popularity"][split] == pytest.approx(sums.result())
    model, builder = load_model(config, folder, store)
    assert torch.equal(model.trend_MI, trend.log_shares_MI)
    assert builder.ordered == order


def test_a_trend_wants_a_store_that_is_split_in_time(tiny_store, tiny_backbone, tmp_path):
    config = tiny_config(tiny_store.path, tiny_backbone, tmp_path / "run", model={"trend": 0.3})
    folder = RunFolder(config.out)
    with pytest.raises(InputError) as caught, folder.claimed(config, resume=False):
        prepare_run(config, folder)
    assert str(caught.value) == f"{tiny_store.path}: keeps no times; prepare with split=global-time"
    assert not config.out.exists()


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_galrec_of_families_end_to_end(tiny_store, tmp_path, family, request):
    place = request.getfixturevalue(family)
    evaluate = {"decoding": "autoregressive"}
    config = tiny_galrec_config(tiny_store.path, place, tmp_path / "run", evaluate=evaluate)
    train_here(config)
    assert_trained(config)
    model, _ = load_model(config, RunFolder(config.out), tiny_store)
    # The tuned language model is what a finished run loads, not the one it began with.
    tuned = RunFolder(config.out).load_parts(RunFolder(config.out).parts_file("train"))
    inside = [name for name in tuned if name.startswith("backbone.")]
    before = Backbone(config.backbone).state_dict()
    assert inside
    for name in inside:
        assert torch.equal(model.state_dict()[name], tuned[name])
    assert any(not torch.equal(tuned[name], before[name.removeprefix("backbone.")]) for name in inside)


@pytest.mark.parametrize("tuning", ["full", "lora", "frozen"])
def test_a_galrec_model_folder_must_be_whole(tiny_store, tiny_backbone, tmp_path, tuning):
    """A part of the tuned language model that is missing would otherwise be a random one."""
    model = {"tuning": tuning}
    config = tiny_galrec_config(tiny_store.path, tiny_backbone, tmp_path / "run", model=model, train={"epochs": 1})
    train_here(config)
    folder = RunFolder(config.out)
    assert sorted(path.name for path in folder.model_folder.iterdir()) == [
        "backbone",
        "manifest.json",
        "model.safetensors",
    ]
    load_model(config, folder, tiny_store)
    weights = folder.backbone_folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    with pytest.raises(InputError, match=r"backbone/model\.safetensors: its checksum is not that of what was written"):
        load_model(config, folder, tiny_store)
    weights.write_bytes(content)
    (folder.model_folder / "manifest.json").unlink()  # as in runs of earlier versions, and where files were exchanged
    whole = folder.load_parts(folder.model_file)
    assert not any(name.startswith("backbone.") for name in whole)
    for name in ("head.bias", "user_projector.weight", "hop_tokens.weight"):
        folder.save_parts(folder.model_file, {part: value for part, value in whole.items() if part != name})
        with pytest.raises(InputError, match=rf"'{name}' is missing or unknown; expected the parts of a galrec"):
            load_model(config, folder, tiny_store)
    folder.save_parts(folder.model_file, {**whole, "answer_slots.weight": torch.zeros(2)})
    with pytest.raises(InputError, match=r"'answer_slots\.weight' is missing or unknown"):
        load_model(config, folder, tiny_store)
    folder.save_parts(folder.model_file, whole)
    inside = folder.load_parts(weights)
    first = min(inside)
    folder.save_parts(weights, {name: value for name, value in inside.items() if name != first})
    with pytest.raises(InputError, match=rf"model/backbone' .* does not load: its files lack '{first}'$"):
        load_model(config, folder, tiny_store)
    weights.unlink()
    with pytest.raises(InputError, match=r"model/backbone' .* does not load: "):
        load_model(config, folder, tiny_store)


# ---- the exported language model, by itself

WITHOUT_RAYGREC = """
import sys
for name in ("deepspeed", "ray", "peft", "raygrec"):
    sys.modules[name] = None  # importing it raises ImportError
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForTextEncoding, AutoTokenizer
run, example, answer = sys.argv[1:4]
given, parts = load_file(example), load_file(run + "/model/model.safetensors")
loader = AutoModelForTextEncoding if sys.argv[4] == "encoder_decoder" else AutoModel
model = loader.from_pretrained(run + "/model/backbone").eval()
assert model.config.num_hidden_layers == 1
assert AutoTokenizer.from_pretrained(run + "/model/backbone")("cats")["input_ids"]
with torch.no_grad():
    hidden = model(inputs_embeds=given["embeds"], attention_mask=given["mask"][:, None]).last_hidden_state
    # [8, I, r]: each user's items, of the fit of the graph that does not know the user.
    rows = given["nodes"] @ parts["item_projector.rows.from_node.weight"].T + parts["item_projector.rows.free"]
    rows = rows + given["texts"] @ parts["item_projector.rows.from_text.weight"].T
    query = hidden.flatten(0, 1)[given["slots"]] @ parts["item_projector.fixed_Dr"]
    save_file({"logits": (rows @ query[:, :, None])[:, :, 0] + parts["head.bias"]}, answer)
"""


@pytest.mark.parametrize(
    ("family", "tuning"),
    [("tiny_backbone", "full"), ("tiny_backbone", "lora"), ("encoder_decoder", "lora"), ("decoder", "full")],
)
def test_the_exported_language_model_and_parts_give_the_runs_logits(tiny_store, tmp_path, family, tuning, request):
    """With nothing but torch, safetensors and transformers."""
    backbone = request.getfixturevalue(family)
    # A rate at which what was trained is far from where it began.
    model = {"tuning": tuning, "backbone_lr": 1.0}
    config = tiny_galrec_config(tiny_store.path, backbone, tmp_path / "run", model=model, backbone={"layers": 1})
    train_here(config)
    folder = RunFolder(config.out)
    builder = build_prompts(config, tiny_store, folder)
    model = build_model(config, tiny_store, builder, folder, distributed=False)
    users, shown = np.arange(8), histories(tiny_store, "test").shown.take(np.arange(8))
    batch = builder.recommending(users, shown)
    with torch.no_grad():
        before = model.slot_logits(batch)[:, 0]
        model.load_state_dict(folder.load_parts(folder.parts_file("train")), strict=False)
        expected = model.slot_logits(batch)[:, 0]
        example = {
            "embeds": model.embed(batch).padded(),
            "mask": batch.attention & torch.ones_like(batch.attention[0]).tril()
            if family == "decoder"
            else batch.attention,
            "slots": batch.slots[:, 0],
            "nodes": model.nodes.items_KId[batch.tables],
            "texts": model.item_texts,
        }
    save_file({name: value.contiguous() for name, value in example.items()}, tmp_path / "example.safetensors")
    answer = tmp_path / "answer.safetensors"
    arguments = [str(config.out), str(tmp_path / "example.safetensors"), str(answer), family]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAYGREC, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(load_file(answer)["logits"], expected, rtol=1e-5, atol=1e-5)
    assert (expected - before).abs().max() > 0.1


@pytest.mark.parametrize("tuning", ["full", "frozen"])
def test_weights_that_are_neither_pretrained_nor_trained_are_exported_as_they_were(
    tiny_store, tiny_backbone, tmp_path, tuning
):
    changes = {"model": {"tuning": tuning}, "backbone": {"pretrained": False}, "train": {"epochs": 1}}
    config = tiny_galrec_config(tiny_store.path, tiny_backbone, tmp_path / "run", seed=3, **changes)
    train_here(config)
    folder = RunFolder(config.out)
    builder = build_prompts(config, tiny_store, folder)
    expected = build_model(config, tiny_store, builder, folder, distributed=False)
    expected.load_state_dict(folder.load_parts(folder.parts_file("train")), strict=False)
    found, _ = load_model(config, folder, tiny_store)
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_galrec_with_titles_end_to_end(tiny_store, tiny_backbone, tmp_path):
    evaluate = {"decoding": "autoregressive"}
    model = {"title_tokens": 3}
    config = tiny_galrec_config(tiny_store.path, tiny_backbone, tmp_path / "run", model=model, evaluate=evaluate)
    train_here(config)
    assert_trained(config)
    _, builder = load_model(config, RunFolder(config.out), tiny_store)
    table = tiny_store.tokens(str(tiny_backbone), TEXT_LENGTH).items
    symbols = builder.recommending(np.arange(1), CSR.from_lists([[5, 2]])).symbols[0].tolist()
    first = builder.symbols.first_item
    assert symbols[1:9] == [first + 5, *table[5][:3], first + 2, *table[2][:3]]


def test_galrec_without_graph_vectors_pretrains_no_graph(tiny_store, tiny_backbone, tmp_path, monkeypatch):
    """Users are made of texts, items of texts and what is trained of them; there is no LightGCN to compare with."""
    monkeypatch.setattr("raygrec.train.assembly.load_or_pretrain", None)
    model = {"graph_vectors": False}
    config = tiny_galrec_config(tiny_store.path, tiny_backbone, tmp_path / "run", model=model)
    train_here(config)
    assert_trained(config)
    folder = RunFolder(config.out)
    assert set(folder.metrics()["baselines"]) == {"Popularity"}
    nodes = NodeEmbeddings.load(folder.nodes_file)
    assert (bool(nodes.items.any()), bool(nodes.users.any())) == (False, True)


def test_a_store_whose_users_have_nothing_to_learn_from_is_refused(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    # Of three items in leave-one-out, one is left for training.
    (source / "sequences.txt").write_text("".join(f"u{n} i{n % 3} i{(n + 1) % 3} i{(n + 2) % 3}\n" for n in range(6)))
    (source / "items.jsonl").write_text("".join(f'{{"item": "i{n}", "title": "item {n}"}}\n' for n in range(3)))
    store = prepare(PrepareOptions(format="sequences", path=source, out=tmp_path / "store", k_core=0))
    content = {"recipe": "sequential", "store": store.path, "out": tmp_path / "run", "evaluate": {"ks": [2]}}
    with pytest.raises(InputError, match="no user has two training items, one to read and one to predict"):
        train_here(run_config(content, "x"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("split", "says"),
    [
        ("valid", "prepare with valid_ratio above 0"),
        ("test", "prepare with test_ratio above 0, or train with evaluate.test=false"),
    ],
)
def test_a_store_without_a_split_that_a_run_reads_is_refused(
    tiny_unordered_store, tiny_backbone, tmp_path, split, says
):
    source, shares = tiny_unordered_store.path.parent, {"split": "ratio", f"{split}_ratio": 0.0}
    store = prepare(PrepareOptions(format="table", path=source, out=tmp_path / "store", k_core=0, **shares))
    config = tiny_graph_config(store.path, tiny_backbone, tmp_path / "run", graph={"text_weight": 0})
    with pytest.raises(InputError) as caught:
        train_here(config)
    assert str(caught.value) == f"{store.path}: no user has a {split} interaction to find; {says}"
    assert not config.out.exists()
    if split == "test":
        found = train_here(config.model_copy(update={"evaluate": EvaluateConfig(ks=(2, 3), test=False)}))
        assert ("valid" in found, "test" in found) == (True, False)


def with_positions(backbone: Path, place: Path, known: int) -> Path:
    """A copy of a backbone whose config says that it tells so many positions apart."""
    shutil.copytree(backbone, place)
    settings = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": known}))
    return place


@pytest.mark.parametrize(("title_tokens", "known"), [(4, 512), (0, 50)])
def test_galrec_refuses_prompts_longer_than_the_language_model_reads(
    tiny_store, tiny_backbone, tmp_path, title_tokens, known
):
    place = with_positions(tiny_backbone, tmp_path / "backbone", known)
    model = {"title_tokens": title_tokens, "max_history": 101, "neighbours": {"two_hop": 2}}
    config = tiny_galrec_config(tiny_store.path, place, tmp_path / "run", model=model)
    needed = 1 + (1 + title_tokens) * 102 + 2 + HOPS
    with pytest.raises(InputError) as caught:
        train_here(config)
    assert str(caught.value) == (
        f"model.max_history=101 with title_tokens={title_tokens} makes prompts of up to {needed} tokens; "
        f"backbone '{place}' reads {known}"
    )
    assert not config.out.exists()


@pytest.mark.parametrize(
    "model", [{}, {"user_token": "id"}, {"user_token": "none", "texts": {"prediction": False, "terms": 2}}]
)
def test_the_longest_prompts_of_glta_are_known_before_it_is_trained(tiny_store, tiny_backbone, tmp_path, model):
    model = {"max_history": 30, "alignment_items": 40, "alignment_tokens": 5, **model}
    config = tiny_config(tiny_store.path, tiny_backbone, tmp_path / "run", model=model)
    folder = RunFolder(config.out)
    with folder.claimed(config, resume=False):
        prepare_run(config, folder)
    builder = build_prompts(config, tiny_store, folder)
    everything = CSR.from_lists([[item % 24 for item in range(40)]] * 48)
    whole = builder.recommending(np.arange(48), everything).symbols.shape[1]
    aligned = builder.alignment(np.arange(24)[None], Draws(0)).symbols.shape[1]
    for needed, where in ((whole, "max_history=30 with slots=3"), (aligned, "alignment_items=40 with alignment_tok")):
        place = with_positions(tiny_backbone, tmp_path / str(needed), needed - 1)
        content = config.model_dump(mode="json") | {"out": tmp_path / "other", "backbone": {"name": str(place)}}
        content["alignment"]["epochs"] = int(needed == aligned)
        with pytest.raises(
            InputError, match=rf"model\.{where}.* makes prompts of up to {needed} tokens; .* {needed - 1}$"
        ):
            train_here(run_config(content, "x"))
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("make", [tiny_galrec_config, tiny_sequential_config, tiny_graph_config])
def test_every_recipe_with_a_language_model_looks_at_its_layers(tiny_store, tiny_backbone, tmp_path, make):
    """Text vectors, which the store keeps, are of the whole one."""
    assert make(tiny_store.path, tiny_backbone, tmp_path / "run").reads_backbone
    config = make(tiny_store.path, tiny_backbone, tmp_path / "run", backbone={"layers": 9})
    with pytest.raises(InputError, match=r"key 'backbone\.layers': 9 given, '.*' has 2$"):
        train_here(config)
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("make", "name"), [(tiny_galrec_config, "GAL-Rec"), (tiny_sequential_config, "BSARec-like + text")]
)
def test_an_unordered_store_is_refused(tiny_unordered_store, tiny_backbone, tmp_path, make, name):
    config = make(tiny_unordered_store.path, tiny_backbone, tmp_path / "run")
    folder = RunFolder(config.out)
    with pytest.raises(InputError) as caught, folder.claimed(config, resume=False):
        prepare_run(config, folder)
    assert str(caught.value) == (
        f"{tiny_unordered_store.path}: {name} reads histories in time order; prepare with split=leave-one-out"
    )
    assert not config.out.exists()


def test_a_run_goes_on_with_the_store_it_was_started_with_alone(tiny_backbone, tmp_path):
    """Another split's training edges may be this one's targets, and the run's nodes know them."""
    store = make_store(tmp_path)
    config = tiny_config(store.path, tiny_backbone, tmp_path / "run")
    cut_here(config, 3)
    folder = RunFolder(config.out)
    nodes = folder.nodes_file.read_bytes()
    store.path.rename(tmp_path / "before")
    assert make_store(tmp_path, "ratio").fingerprint != store.fingerprint
    with pytest.raises(InputError) as caught:
        train_here(config, resume=True)
    assert str(caught.value) == (
        f"{store.path}: not the store that {config.out} was started with (its fingerprint differs); "
        "put that one back, or name another out"
    )
    assert folder.nodes_file.read_bytes() == nodes
    shutil.rmtree(store.path)
    (tmp_path / "before").rename(store.path)
    train_here(config, resume=True)
    assert_trained(config)


def test_a_sequential_baseline_without_texts_needs_no_language_model(tiny_store, tmp_path):
    """And it finds the rule of the tiny store, by which four items lie between one item and the next."""
    config = tiny_sequential_config(
        tiny_store.path,
        Path("nowhere"),
        tmp_path / "run",
        model={"text_vectors": False, "filter": "none", "dropout": 0.1},
        train={"epochs": 25},
    )
    train_here(config)
    assert_trained(config)
    assert RunFolder(config.out).metrics()["test"]["hit@3"] > 0.9
    assert sorted(path.name for path in config.out.iterdir() if path.is_file()) == [
        ".lock",
        ".writer.lock",
        "config.yaml",
        "history.jsonl",
        "metrics.json",
        "store.id",
    ]


def test_a_sequential_model_file_must_be_whole(tiny_store, tiny_backbone, tmp_path):
    config = tiny_sequential_config(tiny_store.path, tiny_backbone, tmp_path / "run", train={"epochs": 1})
    train_here(config)
    folder = RunFolder(config.out)
    (folder.model_folder / "manifest.json").unlink()
    whole = folder.load_parts(folder.model_file)
    for name in ("table.free", "layers.0.filter.root_beta"):
        folder.save_parts(folder.model_file, {part: value for part, value in whole.items() if part != name})
        with pytest.raises(InputError, match=rf"'{name}' is missing or unknown; expected the parts of a sequential"):
            load_model(config, folder, tiny_store)


@pytest.mark.data
@real_data
def test_texts_that_a_language_model_writes(tiny_store, tmp_path):
    backbone = Path(os.environ["RAYGREC_DATA"]) / "stories260k"
    texts = {"source": "generated", "terms": 3}
    config = tiny_config(
        tiny_store.path,
        backbone,
        tmp_path / "run",
        model={"texts": texts, "item_alignment": False},
        train={"epochs": 2, "lr": 0.003},
    )
    train_here(config)
    assert_trained(config)
    assert RunFolder(config.out).metrics()["texts"] == "generated"
    builder = build_prompts(config, tiny_store, RunFolder(config.out))
    assert set(builder.written) == {"train", "valid", "test"}
    for profile, prediction in builder.written.values():
        assert set(profile.lengths) == set(prediction.lengths) == {3}
    # The texts of training prompts were written from the first half of the items, and all of these are shown.
    lengths = builder.train.lengths
    assert np.array_equal(builder.shown_at_least, lengths - lengths // 2)


def test_an_encoder_cannot_write_texts_and_leaves_no_run(tiny_store, tiny_backbone, tmp_path):
    config = tiny_config(tiny_store.path, tiny_backbone, tmp_path / "run", model={"texts": {"source": "generated"}})
    with pytest.raises(InputError, match=r"\(bert\) cannot generate: use model\.texts\.source=extracted"):
        train_here(config)
    assert not config.out.exists()


# ---- the core runs where Ray is not installed

WITHOUT_RAY = """
import importlib, pkgutil, sys
sys.modules["ray"] = None  # importing it raises ImportError
import raygrec
from raygrec import cli
for place in ("data", "graph", "model", "train", "evaluate", "serve"):
    package = importlib.import_module("raygrec." + place)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
sys.argv = ["raygrec", "train", sys.argv[1], "--local", "--json"]
cli.main()
"""


def test_everything_but_the_cluster_runs_without_ray(tiny_store, tiny_backbone, tmp_path):
    config = tiny_config(tiny_store.path, tiny_backbone, tmp_path / "run", train={"epochs": 1}, alignment={"epochs": 1})
    file = tmp_path / "run.yaml"
    file.write_text(config.model_dump_json())  # JSON is YAML
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY, str(file)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == RunFolder(config.out).metrics()
    assert not [line for line in done.stderr.splitlines() if "Traceback" in line or "Warning" in line]
