"""The run folder: config, history, checkpoints and metrics, each written so that a half never counts."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from raygrec.config import read_yaml
from raygrec.errors import InputError
from raygrec.remote import fetch, is_address, upload
from raygrec.train.settings import RunConfig, run_config

KEEP = 2  # checkpoints
METRICS = "metrics.json"


@dataclass
class LoopState:
    """Where a stage stands after `step` updates."""

    stage: str
    step: int = 0
    best: float = -1.0
    best_step: int = 0
    waited: int = 0
    records: int = 0
    """Lines of history.jsonl that this state has seen."""
    sums: list[float] = field(default_factory=list)
    """Of each term of the loss, since the last record."""
    counts: list[float] = field(default_factory=list)
    """What each was summed over."""

    def add(self, sums: list[float], counts: list[float]) -> None:
        self.sums = [a + b for a, b in zip(self.sums or [0.0] * len(sums), sums, strict=True)]
        self.counts = [a + b for a, b in zip(self.counts or [0.0] * len(counts), counts, strict=True)]


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same config with `store` and `out` as absolute paths: a run may go on from another directory."""
    store = config.store if is_address(config.store) else Path(config.store).absolute()
    return config.model_copy(update={"store": store, "out": config.out.absolute()})


def run_at(place: Path | str) -> "RunFolder":
    """The run folder at a path; at an address, a copy of the finished run there."""
    return RunFolder(fetch(str(place), METRICS) if is_address(place) else Path(place))


class RunFolder:
    """Paths and atomic writes of one run; only rank 0 writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.history_file = path / "history.jsonl"
        self.nodes_file = path / "nodes.safetensors"
        self.texts_file = path / "texts.safetensors"
        self.model_folder = path / "model"
        self.model_file = self.model_folder / "model.safetensors"
        self.backbone_folder = self.model_folder / "backbone"

    @contextmanager
    def claimed(self, config: RunConfig, resume: bool) -> Iterator[None]:
        """`start`, and where the block fails to make ready what a new run needs, the folder is gone again."""
        new = not self.config_file.exists()
        self.start(config, resume)
        try:
            yield
        except BaseException:
            if new:
                shutil.rmtree(self.path, ignore_errors=True)
            raise

    def start(self, config: RunConfig, resume: bool) -> None:
        """Claims the folder; an existing run is refused unless `resume`, and then its config must be the same.

        `cluster` and `upload` may differ: a run may go on with another number of workers.
        """
        if self.config_file.exists():
            if not resume:
                raise InputError(
                    f"{self.path}: holds a run already; pass --resume to go on with it, or name another out"
                )
            self._refuse_other(config)
        content = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        try:
            if not self.config_file.exists() and self.path.exists() and any(self.path.iterdir()):
                raise InputError(f"{self.path}: is not empty and holds no run; name a folder that does not exist yet")
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._write(self.config_file, content)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be a run folder ({error.strerror or error})") from None

    def _refuse_other(self, config: RunConfig) -> None:
        before, given = (
            _flat(with_absolute_paths(one).model_dump(mode="json", exclude={"cluster", "out", "upload"}))
            for one in (self.config(), config)
        )
        for key in (key for key, value in given.items() if before.get(key) != value):
            raise InputError(
                f"{self.config_file}: the run was started with {key}={before.get(key)}, now it is {given[key]}; "
                "resume with the run's own config, or name another out"
            )

    def config(self) -> RunConfig:
        """The effective config the run was started with."""
        if not self.config_file.is_file():
            raise InputError(f"{self.path}: no run there (config.yaml is missing)")
        return run_config(read_yaml(self.config_file), str(self.config_file))

    def report(self, record: dict[str, Any]) -> None:
        """Appends one line to history.jsonl."""
        with self.history_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """All reports, oldest first; a last line that was cut off while it was written does not count."""
        return [json.loads(line) for line in self._lines() if line.endswith("\n")]

    def forget_after(self, records: int) -> None:
        """Cuts history.jsonl back to what a checkpoint has seen; the steps after it will run again."""
        lines = self._lines()
        if len(lines) > records:
            self._write(self.history_file, "".join(lines[:records]))

    def _lines(self) -> list[str]:
        return self.history_file.read_text(encoding="utf-8").splitlines(True) if self.history_file.exists() else []

    def save_checkpoint(self, state: LoopState, tensors: dict[str, torch.Tensor]) -> None:
        """Writes checkpoints/<stage>-<step>, then drops all but the newest `KEEP` of the stage."""
        with self.drafted(self.checkpoints / f"{state.stage}-{state.step:08d}") as draft:
            save_file(tensors, draft / "state.safetensors")
            (draft / "loop.json").write_text(json.dumps(asdict(state)) + "\n", encoding="utf-8")
        for old in self._checkpoints(state.stage)[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)

    @contextmanager
    def drafted(self, place: Path) -> Iterator[Path]:
        """An empty folder to fill, which takes the place of `place` once the block has ended well."""
        draft = place.with_name(f".{place.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        shutil.rmtree(place, ignore_errors=True)
        draft.rename(place)

    def last_checkpoint(self, stage: str) -> tuple[LoopState, dict[str, torch.Tensor]] | None:
        """The newest complete checkpoint of a stage, or None; `InputError` where its files are damaged."""
        found = self._checkpoints(stage)
        if not found:
            return None
        file = found[-1] / "loop.json"
        try:
            state = LoopState(**_read_json(file))
        except TypeError:
            raise InputError(f"{file}: not the loop state of this version; remove the folder {found[-1]}") from None
        return state, self.load_parts(found[-1] / "state.safetensors")

    def _checkpoints(self, stage: str) -> list[Path]:
        return sorted(self.checkpoints.glob(f"{stage}-[0-9]*"))

    def parts_file(self, name: str) -> Path:
        """Where the trained parameters of a finished stage, or the best so far, are kept."""
        return self.checkpoints / f"{name}.safetensors"

    def save_parts(self, file: Path, parts: dict[str, torch.Tensor]) -> None:
        """Writes trained parameters by name, atomically."""
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{file.name}.draft")
        save_file(parts, draft)
        os.replace(draft, file)

    def load_parts(self, file: Path) -> dict[str, torch.Tensor]:
        """What `save_parts` wrote; `InputError` where the file is not such a file."""
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file}: not readable as safetensors ({error})") from None

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Writes metrics.json, the sign that the run has finished."""
        self._write(self.path / METRICS, json.dumps(metrics, indent=2) + "\n")

    def publish(self, config: RunConfig) -> None:
        """Copies the finished run to where its config wants it, metrics.json last of all."""
        if config.upload:
            upload(self.path, config.upload, METRICS, without=("checkpoints", "ray"))

    def metrics(self) -> dict[str, Any] | None:
        """The final metrics, or None while the run has not finished."""
        file = self.path / METRICS
        return _read_json(file) if file.exists() else None

    def _write(self, file: Path, content: str) -> None:
        draft = file.with_name(f".{file.name}.draft")
        draft.write_text(content, encoding="utf-8")
        os.replace(draft, file)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:  # no JSON, or no UTF-8
        raise InputError(f"{file}: not valid JSON ({error})") from None


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Sections as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
