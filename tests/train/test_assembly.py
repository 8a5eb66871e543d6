import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from raygrec.data.arrays import CSR
from raygrec.errors import InputError
from raygrec.model import text_vectors
from raygrec.model.backbone import Backbone, BackboneConfig
from raygrec.model.glta import GLTA
from raygrec.train.assembly import (
    TEXT_LENGTH,
    build_model,
    build_prompts,
    fitted_items,
    histories,
    load_model,
    prepare_run,
    truncated_to,
)
from raygrec.train.folder import RunFolder
from raygrec.train.local import train_here
from tests.train.workers import tiny_config, tiny_galrec_config

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


def test_cross_fitting_leaves_out_the_last_items(tiny_store):
    config = tiny_config(tiny_store.path, Path("b"), Path("r"), model={"user_vector": "cross_fit", "slots": 2})
    edges, counts = fitted_items(tiny_store, config)
    train = rows(tiny_store.interactions("train"))
    # min(k, half of them) are held out: 1 of 2, 1 of 3, 2 of 4.
    assert {len(items): int(count) for items, count in zip(train, counts, strict=True)} == {2: 1, 3: 2, 4: 2}
    assert rows(edges) == [items[:count] for items, count in zip(train, counts, strict=True)]


def test_other_user_vectors_are_fitted_on_all_training_items(tiny_store):
    edges, counts = fitted_items(tiny_store, tiny_config(tiny_store.path, Path("b"), Path("r")))
    assert rows(edges) == rows(tiny_store.interactions("train"))
    assert counts is None


def test_cross_fitted_prompts_show_what_the_embeddings_were_fitted_on(tiny_store, tiny_backbone, tmp_path):
    model = {"user_vector": "cross_fit"}
    config = tiny_config(tiny_store.path, tiny_backbone, tmp_path / "run", model=model, train={"epochs": 1})
    train_here(config)
    _, counts = fitted_items(tiny_store, config)
    assert np.array_equal(build_prompts(config, tiny_store, RunFolder(config.out)).shown_at_least, counts)
    assert "LightGCN" not in RunFolder(config.out).metrics()["baselines"]


def test_the_heads_texts_are_read_before_workers_start_and_only_where_they_are_asked_for(
    tiny_store, tiny_backbone, tmp_path, monkeypatch
):
    loads, load = [], text_vectors.Backbone
    monkeypatch.setattr(text_vectors, "Backbone", lambda config: loads.append(config) or load(config))

    def model_of(name: str, **model: object) -> GLTA:
        config = tiny_config(tiny_store.path, tiny_backbone, tmp_path / name, model=model)
        untrained = {"pretrained": False, "layers": 1}  # of which no other test has read the texts
        config = config.model_copy(update={"backbone": config.backbone.model_copy(update=untrained)})
        folder = RunFolder(config.out)
        with folder.claimed(config, resume=False):
            prepare_run(config, folder)
        read = len(loads)
        model = build_model(config, tiny_store, build_prompts(config, tiny_store, folder), folder, distributed=False)
        assert len(loads) == read
        return model

    without = model_of("without", head_texts=False)
    assert (without.item_texts, without.head.rows.from_text, loads) == (None, None, [])
    found = model_of("with").item_texts
    assert len(loads) == 1
    tokens = tiny_store.tokens(str(tiny_backbone), TEXT_LENGTH).items
    config = BackboneConfig(name=str(tiny_backbone), pretrained=False)
    texts = text_vectors.load_or_read_texts(config, tokens, tmp_path / "again")
    centred = texts - texts.mean(0)
    torch.testing.assert_close(found / found.norm(), centred / centred.norm())


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
    losses = [record["loss"] for record in folder.history() if record["stage"] == "train"]
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


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_galrec_of_families_end_to_end(tiny_store, tmp_path, family, request):
    place = request.getfixturevalue(family)
    evaluate = {"decoding": "autoregressive"}
    config = tiny_galrec_config(tiny_store.path, place, tmp_path / "run", evaluate=evaluate)
    train_here(config)
    assert_trained(config)
    model, _ = load_model(config, RunFolder(config.out), tiny_store)
    # The tuned language model is what a finished run loads, not the one it began with.
    tuned = RunFolder(config.out).load_parts(RunFolder(config.out).model_file)
    inside = [name for name in tuned if name.startswith("backbone.")]
    before = Backbone(config.backbone).state_dict()
    assert inside
    for name in inside:
        torch.testing.assert_close(model.state_dict()[name], tuned[name])
    assert any(not torch.equal(tuned[name], before[name.removeprefix("backbone.")]) for name in inside)


@pytest.mark.parametrize("tuning", ["full", "frozen"])
def test_a_galrec_model_file_must_be_whole(tiny_store, tiny_backbone, tmp_path, tuning):
    """A part of the tuned language model that is missing would otherwise be the pretrained one's."""
    model = {"tuning": tuning}
    config = tiny_galrec_config(tiny_store.path, tiny_backbone, tmp_path / "run", model=model, train={"epochs": 1})
    train_here(config)
    folder = RunFolder(config.out)
    load_model(config, folder, tiny_store)
    whole = folder.load_parts(folder.model_file)
    inside = {name for name in whole if name.startswith("backbone.")}
    assert bool(inside) == (tuning == "full")
    for name in ("head.bias", "user_projector.weight", "hop_tokens.weight", *sorted(inside)[:1]):
        folder.save_parts(folder.model_file, {part: value for part, value in whole.items() if part != name})
        with pytest.raises(InputError, match=rf"'{name}' is missing or unknown; expected the parts of a galrec"):
            load_model(config, folder, tiny_store)
    folder.save_parts(folder.model_file, {**whole, "answer_slots.weight": torch.zeros(2)})
    with pytest.raises(InputError, match=r"'answer_slots\.weight' is missing or unknown"):
        load_model(config, folder, tiny_store)


def test_galrec_refuses_an_unordered_store(tiny_unordered_store, tiny_backbone, tmp_path):
    config = tiny_galrec_config(tiny_unordered_store.path, tiny_backbone, tmp_path / "run")
    folder = RunFolder(config.out)
    with pytest.raises(InputError) as caught, folder.claimed(config, resume=False):
        prepare_run(config, folder)
    assert str(caught.value) == (
        f"{tiny_unordered_store.path}: GAL-Rec reads histories in time order; prepare with split=leave-one-out"
    )
    assert not config.out.exists()


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
