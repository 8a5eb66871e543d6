import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from raygrec.data.arrays import CSR
from raygrec.data.files import sha256
from raygrec.errors import InputError
from raygrec.model import text_vectors
from raygrec.model.backbone import BackboneConfig
from raygrec.model.text_vectors import load_or_read_texts, reading_key

# What opens and closes a text of each kind of model, as `transformers` names these tokens.
SPECIAL = {
    "bert": {"cls_token": "[CLS]", "sep_token": "[SEP]"},
    "llama": {"bos_token": "<s>", "eos_token": "</s>"},
}
TEXTS = ["w7 w9", "", "w5", "w9 w7", "w5 w6 w7 w8 w9 w10 w11 w12", "w20 w21 w22", "w5"]


def save_tokenizer(folder: Path, special: dict[str, str]) -> None:
    """Words w5 to w59, and the texts between the opening and the closing token, where there are these."""
    words = {word: number for number, word in enumerate(("[PAD]", "[CLS]", "[SEP]", "<s>", "</s>"))}
    words |= {f"w{number}": number for number in range(5, 60)}
    tokenizer = Tokenizer(models.WordLevel(words, "[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        opening, closing = special.values()
        around = [(token, words[token]) for token in (opening, closing)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{opening} $A {closing}", special_tokens=around
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", **special).save_pretrained(folder)


@pytest.fixture
def model_folder(backbone_folder, tmp_path):
    """kind -> a copy of that tiny model with a tokenizer."""

    def folder(kind: str, special: dict[str, str] | None = None) -> Path:
        place = tmp_path / f"model-{kind}"
        shutil.copytree(backbone_folder(kind), place)
        save_tokenizer(place, SPECIAL[kind] if special is None else special)
        return place

    return folder


def tokens_of(folder: Path, texts: list[str] = TEXTS) -> CSR:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return CSR.from_lists([tokenizer.encode(text, add_special_tokens=False) for text in texts])


def files(folder: Path) -> list[Path]:
    """What lies there but for locks."""
    return [file for file in folder.iterdir() if file.suffix != ".lock"]


def read_alone(folder: Path, texts: list[str] = TEXTS) -> torch.Tensor:
    """The same by nothing but `transformers`: one text at a time, unpadded, through the model's own embeddings."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        means = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
    return torch.stack([functional.normalize(mean, dim=0) for mean in means])


@pytest.fixture
def loads(monkeypatch) -> list[BackboneConfig]:
    """The backbones that were loaded, one by one."""
    loaded, load = [], text_vectors.Backbone
    monkeypatch.setattr(text_vectors, "Backbone", lambda config: loaded.append(config) or load(config))
    return loaded


@pytest.mark.parametrize("per_pass", [1, 25, 4096], ids=["alone", "in parts", "at once"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_vectors_are_the_normalised_means_of_the_models_own_hidden_states(
    kind, per_pass, model_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(text_vectors, "TOKENS_PER_PASS", per_pass)
    folder = model_folder(kind)
    found = load_or_read_texts(BackboneConfig(name=str(folder)), tokens_of(folder), tmp_path / "kept")
    expected = read_alone(folder)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(TEXTS)))
    # Order of words, length and the words themselves all tell: what is compared is no constant.
    assert torch.pdist(expected[:6]).min() > 1e-3


def test_the_whole_model_reads_whatever_a_run_keeps_of_it(model_folder, tmp_path, loads):
    folder = model_folder("bert")
    whole, first = (
        load_or_read_texts(BackboneConfig(name=str(folder), layers=n), tokens_of(folder), tmp_path / str(n))
        for n in (None, 1)
    )
    assert torch.equal(whole, first)
    assert [config.layers for config in loads] == [None, None]


def test_a_model_that_marks_neither_end_of_a_text(model_folder, tmp_path):
    folder = model_folder("llama", special={})
    words = [text for text in TEXTS if text]
    found = load_or_read_texts(BackboneConfig(name=str(folder)), tokens_of(folder), tmp_path / "kept")
    torch.testing.assert_close(found[[0, 2, 3, 4, 5, 6]], read_alone(folder, words), rtol=1e-4, atol=1e-5)
    assert torch.equal(found[1], torch.zeros(16))  # the text of no token at all


def test_items_that_all_have_no_text(model_folder, tmp_path):
    folder = model_folder("bert")
    found = load_or_read_texts(BackboneConfig(name=str(folder)), tokens_of(folder, [""] * 3), tmp_path / "kept")
    torch.testing.assert_close(found, read_alone(folder, [""]).expand(3, -1), rtol=1e-4, atol=1e-5)


def test_what_was_read_once_is_kept(model_folder, tmp_path, loads):
    folder, kept = model_folder("bert"), tmp_path / "deep" / "kept"
    config, tokens = BackboneConfig(name=str(folder)), tokens_of(folder)
    first = load_or_read_texts(config, tokens, kept)
    assert len(loads) == 1
    for again in (config, config.model_copy(update={"layers": 1})):
        assert torch.equal(load_or_read_texts(again, tokens, kept), first)
    assert len(loads) == 1
    assert [file.suffix for file in files(kept)] == [".safetensors"]


def test_what_was_read_is_read_again_where_anything_has_changed(model_folder, tmp_path, loads):
    folder, kept = model_folder("bert"), tmp_path / "kept"
    config, tokens = BackboneConfig(name=str(folder)), tokens_of(folder)
    other_tokens = CSR(tokens.indptr, np.where(np.asarray(tokens.indices) == 7, 8, tokens.indices))
    # The same ids in a row, but cut into other texts.
    other_rows = CSR(np.array([0, 1, *tokens.indptr[2:]]), tokens.indices)
    results = [
        load_or_read_texts(config, tokens, kept),
        load_or_read_texts(config, other_tokens, kept),
        load_or_read_texts(config, other_rows, kept),
    ]
    model = AutoModel.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    model.save_pretrained(folder)
    results.append(load_or_read_texts(config, tokens, kept))
    assert len(loads) == len(files(kept)) == len(results)
    torch.testing.assert_close(results[-1], read_alone(folder), rtol=1e-4, atol=1e-5)
    for number, one in enumerate(results):
        assert all((one - other).abs().max() > 1e-3 for other in results[:number])


def test_other_weights_of_the_same_size_are_read_however_large_they_are(model_folder, tmp_path, monkeypatch):
    folder, kept, hashed = model_folder("bert"), tmp_path / "kept", []
    monkeypatch.setattr(text_vectors, "sha256", lambda file: hashed.append(file.name) or sha256(file))
    config, tokens = BackboneConfig(name=str(folder)), tokens_of(folder)
    model = AutoModel.from_pretrained(folder)
    model.resize_token_embeddings(2000)
    found = []
    for _ in range(2):
        for parameter in model.parameters():
            parameter.data.mul_(1.5)
        model.save_pretrained(folder)
        assert (folder / "model.safetensors").stat().st_size > 2**16
        found.append(load_or_read_texts(config, tokens, kept))
        torch.testing.assert_close(found[-1], read_alone(folder), rtol=1e-4, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3
    key, before = reading_key(config, tokens), len(hashed)
    assert hashed.count("model.safetensors") == 2  # once per version, although each was asked for more than once
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes())  # copied again
    os.utime(weights, ns=(0, 0))
    assert reading_key(config, tokens) == key
    assert len(hashed) == before + 1


def test_a_hub_id_is_known_by_the_commit_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config, tokens = BackboneConfig(name="some/model"), CSR.from_lists([[5]])
    keys = [reading_key(config, tokens)]
    for commit in ("a" * 40, "b" * 40):
        snapshot = tmp_path / "models--some--model" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (tmp_path / "models--some--model" / "refs").mkdir(exist_ok=True)
        (tmp_path / "models--some--model" / "refs" / "main").write_text(commit)
        keys.append(reading_key(config, tokens))
        (snapshot / "model.safetensors").write_bytes(b"weights that come after the config")
        assert reading_key(config, tokens) == keys[-1]
    assert len(set(keys)) == 3
    assert reading_key(BackboneConfig(name="no/such/id"), tokens)


def test_texts_are_read_by_pretrained_weights_whatever_reads_the_prompts(model_folder, tmp_path):
    folder = model_folder("bert")
    config, tokens = BackboneConfig(name=str(folder), pretrained=False), tokens_of(folder)
    torch.testing.assert_close(load_or_read_texts(config, tokens, tmp_path / "kept"), read_alone(folder))


def test_a_run_that_was_cut_off_while_it_read_leaves_nothing(model_folder, tmp_path, monkeypatch):
    folder, kept = model_folder("bert"), tmp_path / "kept"
    config, tokens = BackboneConfig(name=str(folder)), tokens_of(folder)

    def half(tensors, file, *_):
        Path(file).write_bytes(b"\x08")
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(text_vectors, "save_file", half)
        with pytest.raises((OSError, InputError), match="no space left"):
            load_or_read_texts(config, tokens, kept)
    assert not files(kept)
    torch.testing.assert_close(load_or_read_texts(config, tokens, kept), read_alone(folder), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-4]),
        lambda file: file.write_bytes(b""),
        lambda file: text_vectors.save_file({"users": torch.zeros(1)}, file),
    ],
    ids=["cut off", "empty", "other tensors"],
)
def test_a_file_that_cannot_be_read_is_named_in_one_line(model_folder, tmp_path, damage):
    folder, kept = model_folder("bert"), tmp_path / "kept"
    config, tokens = BackboneConfig(name=str(folder)), tokens_of(folder)
    load_or_read_texts(config, tokens, kept)
    [file] = files(kept)
    damage(file)
    with pytest.raises(InputError) as error:
        load_or_read_texts(config, tokens, kept)
    message = str(error.value)
    assert message.startswith(f"{file}: text vectors cannot be read (")
    assert message.endswith("remove this file")
    assert "\n" not in message
    file.unlink()
    load_or_read_texts(config, tokens, kept)
