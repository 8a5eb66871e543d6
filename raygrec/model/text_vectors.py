"""One vector per item from the frozen language model's reading of its text, made once per store and backbone."""

import gc
import hashlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from raygrec.data.arrays import CSR
from raygrec.data.files import sha256
from raygrec.errors import InputError, StorageError
from raygrec.model.backbone import Backbone, BackboneConfig, load_tokenizer, resolve
from raygrec.progress import track
from raygrec.storage import made_once, replaced

TOKENS_PER_PASS = 4096


def load_or_read_texts(config: BackboneConfig, tokens: CSR, folder: Path) -> torch.Tensor:
    """Text vectors [I, D] of the items' token ids `tokens` (one row per item), kept in `folder`.

    The mean of the whole pretrained LM's last hidden states over the text at length 1, whatever `config.layers` and
    `config.pretrained` say of the LM that reads the prompts;
    an item without text gets what the LM makes of its opening and closing tokens alone. Made again where the
    backbone's files or the token ids have changed. Of several processes that want them at once, one makes them.
    """
    file = folder / f"{reading_key(config, tokens)}.safetensors"

    def make() -> None:
        vectors = _read_texts(config, tokens)
        gc.collect()  # the language model, whose parts know one another, before training builds its own
        with replaced(file) as draft:
            save_file({"items": vectors}, draft, {"backbone": config.name})

    try:
        made_once(file, make)
    except (OSError, SafetensorError, StorageError) as error:
        raise InputError(f"{file}: text vectors cannot be written ({error})") from None
    try:
        return load_file(file)["items"]
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{file}: text vectors cannot be read ({error}); remove this file") from None


class TextReader:
    """Makes vectors of texts with a language model: the mean of the last hidden states over a text, at length 1.

    A text is read between the model's own opening and closing token, where it has these.
    """

    def __init__(self, backbone: Backbone, name: str) -> None:
        """name: of the backbone, whose tokenizer says what opens and closes a text."""
        self.backbone = backbone
        tokenizer = load_tokenizer(name)
        self._opening = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
        self._closing = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id

    def __call__(self, texts: list[np.ndarray]) -> torch.Tensor:
        """Vectors [n, D] of n texts' token ids, read in one pass, on the model's device."""
        device = next(self.backbone.parameters()).device
        rows = [[self._opening, *text.tolist(), self._closing] for text in texts]
        rows = [[token for token in row if token is not None] for row in rows]
        width = max(1, *map(len, rows))
        ids_BT = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        shown_BT = torch.arange(width, device=device) < torch.tensor([len(row) for row in rows], device=device)[:, None]
        attention_BTT = shown_BT[:, None, :] | torch.eye(width, dtype=torch.bool, device=device)
        hidden_BTD = self.backbone(self.backbone.embed(ids_BT), attention_BTT)
        mean_BD = (hidden_BTD * shown_BT[..., None]).sum(1) / shown_BT.sum(1, keepdim=True).clamp(min=1)
        return torch.nn.functional.normalize(mean_BD.float(), dim=1)


def alike_in_length(lengths: np.ndarray) -> list[np.ndarray]:
    """The texts of these lengths in parts of at most `TOKENS_PER_PASS` tokens, opened and closed, as numbers."""
    order = np.argsort(lengths, kind="stable")
    size = max(1, TOKENS_PER_PASS // (int(lengths.max(initial=0)) + 2))
    return [order[start : start + size] for start in range(0, len(order), size)]


@torch.inference_mode()
def _read_texts(config: BackboneConfig, tokens: CSR) -> torch.Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = Backbone(config.model_copy(update={"layers": None, "pretrained": True})).freeze().to(device)
    read = TextReader(backbone, config.name)
    vectors_ID = torch.zeros(len(tokens), backbone.width)
    for items in track(alike_in_length(tokens.lengths), "texts read by the model"):
        vectors_ID[torch.from_numpy(items)] = read([tokens[item] for item in items]).cpu()
    return vectors_ID


def reading_key(config: BackboneConfig, tokens: CSR) -> str:
    """16 hex digits over the backbone's name, its files' names and content, and the token ids.

    The same files give the same key on every machine. Of a hub id, the commit that is in the cache stands for the
    files. `InputError` where a file cannot be read.
    """
    source = resolve(config.name)
    digest = hashlib.sha256(config.name.encode())
    if Path(source).is_dir():
        for file in sorted(path for path in Path(source).glob("*") if path.is_file()):
            status = file.stat()
            digest.update(f"{file.name} {_content(file.resolve(), status.st_size, status.st_mtime_ns)}\n".encode())
    else:
        digest.update(_commit(source).encode())
    digest.update(np.ascontiguousarray(tokens.indptr, dtype="<i8"))
    digest.update(np.ascontiguousarray(tokens.indices, dtype="<i4"))
    return digest.hexdigest()[:16]


@cache
def _content(file: Path, size: int, modified: int) -> str:
    """The file's SHA-256, which weights of gigabytes take half a minute for: once per process and version."""
    return sha256(file)


def _commit(hub_id: str) -> str:
    """The commit whose config is in the hub's cache; empty where there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(hub_id, "config.json")
    except HFValidationError:
        return ""
    return Path(file).parent.name if isinstance(file, str) else ""
