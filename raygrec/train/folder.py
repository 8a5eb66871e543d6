"""The run folder: config, history, checkpoints and metrics, each written so that a half never counts."""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from raygrec.config import read_yaml, validate
from raygrec.errors import InputError
from raygrec.train.settings import RunConfig

KEEP = 2  # checkpoints


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
    loss: float = 0.0
    """Summed over the targets since the last record."""
    targets: float = 0.0


class RunFolder:
    """Paths and atomic writes of one run; only rank 0 writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.history_file = path / "history.jsonl"
        self.nodes_file = path / "nodes.safetensors"
        self.texts_file = path / "texts.safetensors"
        self.model_file = path / "model" / "model.safetensors"

    def start(self, config: RunConfig, resume: bool) -> None:
        """Claims the folder; an existing run is refused unless `resume`, and then its config must be the same."""
        file = self.path / "config.yaml"
        if file.exists():
            if not resume:
                raise InputError(
                    f"{self.path}: holds a run already; pass --resume to go on with it, or name another out"
                )
            if self.config() != config:
                raise InputError(
                    f"{file}: differs from the given config; resume with the run's own, or name another out"
                )
            return
        if self.path.exists() and any(self.path.iterdir()):
            raise InputError(f"{self.path}: is not empty and holds no run; name a folder that does not exist yet")
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        content = yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False)
        self._write(file, content)

    def config(self) -> RunConfig:
        """The effective config the run was started with."""
        file = self.path / "config.yaml"
        if not file.is_file():
            raise InputError(f"{self.path}: no run there (config.yaml is missing)")
        return validate(RunConfig, read_yaml(file), str(file))

    def report(self, record: dict[str, Any]) -> None:
        """Appends one line to history.jsonl."""
        with self.history_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """All reports, oldest first."""
        if not self.history_file.exists():
            return []
        return [json.loads(line) for line in self.history_file.read_text(encoding="utf-8").splitlines()]

    def forget_after(self, records: int) -> None:
        """Cuts history.jsonl back to what a checkpoint has seen; the steps after it will run again."""
        lines = self.history_file.read_text(encoding="utf-8").splitlines(True) if self.history_file.exists() else []
        if len(lines) > records:
            self._write(self.history_file, "".join(lines[:records]))

    def save_checkpoint(self, state: LoopState, tensors: dict[str, torch.Tensor]) -> None:
        """Writes checkpoints/<stage>-<step>, then drops all but the newest `KEEP` of the stage."""
        name = f"{state.stage}-{state.step:08d}"
        draft = self.checkpoints / f".{name}.draft"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        save_file(tensors, draft / "state.safetensors")
        (draft / "loop.json").write_text(json.dumps(asdict(state)) + "\n", encoding="utf-8")
        place = self.checkpoints / name
        shutil.rmtree(place, ignore_errors=True)
        draft.rename(place)
        for old in self._checkpoints(state.stage)[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)

    def last_checkpoint(self, stage: str) -> tuple[LoopState, dict[str, torch.Tensor]] | None:
        """The newest complete checkpoint of a stage, or None."""
        found = self._checkpoints(stage)
        if not found:
            return None
        state = LoopState(**json.loads((found[-1] / "loop.json").read_text(encoding="utf-8")))
        return state, load_file(found[-1] / "state.safetensors")

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
        self._write(self.path / "metrics.json", json.dumps(metrics, indent=2) + "\n")

    def metrics(self) -> dict[str, Any] | None:
        """The final metrics, or None while the run has not finished."""
        file = self.path / "metrics.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def _write(self, file: Path, content: str) -> None:
        draft = file.with_name(f".{file.name}.draft")
        draft.write_text(content, encoding="utf-8")
        os.replace(draft, file)
