"""The run folder: config, history, checkpoints and metrics, each written so that a half never counts."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from raygrec.config import flat, read_yaml
from raygrec.errors import InputError
from raygrec.model.backbone import resolve
from raygrec.progress import tell
from raygrec.remote import fetch, is_address, upload
from raygrec.storage import gone_if_it_fails, mode_of_new, sync, write_whole, writing
from raygrec.tensors import load_tensors, save_tensors, size
from raygrec.train import manifest
from raygrec.train.lock import held
from raygrec.train.settings import RunConfig, run_config

KEEP = 2  # checkpoints
STEP_DIGITS = 8
METRICS = "metrics.json"
MAY_DIFFER: dict[str, Any] = {
    **dict.fromkeys(("cluster", "out", "upload", "upload_checkpoints", "track"), True),
    "engine": {"zero_stage", "activation_checkpointing", "offload_optimizer", "offload_parameters"},
}
LOCK, WRITER_LOCK = ".lock", ".writer.lock"  # of the process that started the run, and of its rank 0


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
    """The same config with `store`, `out` and a backbone's folder as absolute paths: a run may go on from another
    directory, and Ray's workers sit in one."""
    store = config.store if is_address(config.store) else Path(config.store).absolute()
    changes: dict[str, Any] = {"store": store, "out": config.out.absolute()}
    name = config.backbone.name
    if Path(name).is_dir() and resolve(name) == name:  # not `minilm`, whatever lies here
        changes["backbone"] = config.backbone.model_copy(update={"name": str(Path(name).absolute())})
    return config.model_copy(update=changes)


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
        self.batch_file = path / "not_finite.json"
        self.nodes_file = path / "nodes.safetensors"
        self.texts_file = path / "texts.safetensors"
        self.vectors_file = path / "text_vectors.safetensors"
        self.model_folder = path / "model"
        self.model_file = self.model_folder / "model.safetensors"
        self.backbone_folder = self.model_folder / "backbone"
        self.saved: Callable[[str], None] | None = None
        """Hears the name of each checkpoint that is complete."""

    @property
    def title(self) -> str:
        """What trackers list the run as: its folder's name, and within a sweep SWEEP/TRIAL/seed-N."""
        trial, among = self.path.parent, self.path.parent.parent
        if among.name not in ("trials", "final"):
            return self.path.name
        return f"{among.parent.name}/{trial.name}/{self.path.name}"

    @contextmanager
    def held(self, lock: str = LOCK, wait: float = 0.0) -> Iterator[None]:
        """The folder belongs to this process while the block runs; `InputError` where it is another's.

        wait: seconds to let the other one end.
        """
        self._make()
        with held(self.path / lock, wait):
            yield

    @contextmanager
    def claimed(self, config: RunConfig, resume: bool) -> Iterator[None]:
        """`start`, and where the block fails to make ready what a new run needs, the folder is gone again."""
        new = not self.config_file.exists()
        self.start(config, resume)
        with gone_if_it_fails(self.path, new):
            yield

    def start(self, config: RunConfig, resume: bool) -> None:
        """Claims the folder; an existing run is refused unless `resume`, and then its config must be the same.

        `MAY_DIFFER` names what may be another: a run may go on with more workers, spread or hold its state in another
        way, which changes no more than rounding, and tell others how it is doing. The folder keeps the new config, but
        for a finished run.
        """
        if self.config_file.exists():
            if not resume:
                raise InputError(
                    f"{self.path}: holds a run already; pass --resume to go on with it, or name another out"
                )
            self._refuse_other(config)
        self._make()
        for draft in (*self.path.glob(".*.draft"), *self.checkpoints.glob(".*.draft")):
            _remove(draft)  # of a process that was killed
        content = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        with self._as_run_folder():
            if self.metrics() is None:
                write_whole(self.config_file, content)
            self.checkpoints.mkdir(exist_ok=True)

    def _make(self) -> None:
        with self._as_run_folder():
            self.path.mkdir(parents=True, exist_ok=True)
            ours = (LOCK, f".{self.config_file.name}.")  # what a start leaves that was cut off
            foreign = any(not path.name.startswith(ours) for path in self.path.iterdir())
            if foreign and not self.config_file.exists():
                raise InputError(f"{self.path}: is not empty and holds no run; name a folder that does not exist yet")

    @contextmanager
    def _as_run_folder(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"{self.path}: cannot be a run folder ({error.strerror or error})") from None

    def _refuse_other(self, config: RunConfig) -> None:
        before, given = (
            flat(with_absolute_paths(one).model_dump(mode="json", exclude=MAY_DIFFER))
            for one in (self.config(), config)
        )
        for key in (key for key in given | before if before.get(key) != given.get(key)):
            raise InputError(
                f"{self.config_file}: the run was started with {key}={before.get(key)}, now it is {given.get(key)}; "
                "resume with the run's own config, or name another out"
            )

    def config(self) -> RunConfig:
        """The effective config the run was started with."""
        if not self.config_file.is_file():
            raise InputError(f"{self.path}: no run there (config.yaml is missing)")
        return run_config(read_yaml(self.config_file), str(self.config_file))

    def kept(self, name: str, make: Callable[[], str]) -> str:
        """What `make` returned when it was first asked for the id `name` in this folder."""
        file = self.path / f"{name}.id"
        if not file.exists():
            write_whole(file, make())
        return file.read_text(encoding="utf-8")

    def report(self, record: dict[str, Any]) -> None:
        """Appends one line to history.jsonl."""
        line = json.dumps(record) + "\n"
        with (
            writing(self.history_file, len(line)),
            open(self.history_file, "a", encoding="utf-8", opener=_open_no_link) as file,
        ):
            file.write(line)

    def history(self) -> list[dict[str, Any]]:
        """All reports, oldest first; a last line that was cut off while it was written does not count."""
        return [json.loads(line) for line in self._lines() if line.endswith("\n")]

    def forget_after(self, records: int) -> None:
        """Cuts history.jsonl back to what a checkpoint has seen; the steps after it will run again."""
        lines = self._lines()
        if len(lines) > records:
            write_whole(self.history_file, "".join(lines[:records]))

    def _lines(self) -> list[str]:
        return self.history_file.read_text(encoding="utf-8").splitlines(True) if self.history_file.exists() else []

    def save_checkpoint(self, state: LoopState, tensors: dict[str, torch.Tensor]) -> None:
        """Writes checkpoints/<stage>-<step>, then drops all but the newest `KEEP` of the stage."""
        with self.drafted(self.checkpoints / _name(state), size(tensors)) as draft:
            save_file(tensors, draft / "state.safetensors")  # of which the manifest keeps a checksum
            (draft / "loop.json").write_text(json.dumps(asdict(state)) + "\n", encoding="utf-8")
        for old in self._checkpoints(state.stage)[:-KEEP]:
            _remove(old)
        if self.saved is not None:
            self.saved(_name(state))

    @contextmanager
    def drafted(self, place: Path, needed: int | None = None) -> Iterator[Path]:
        """An empty folder to fill, which gets its manifest and the place of `place` once the block has ended well.

        Otherwise the draft is gone and `place` is as before; needed: bytes, for the message of a full disk.
        """
        draft = place.with_name(f".{place.name}.draft")
        with writing(place, needed):
            try:
                _remove(draft)
                draft.mkdir(parents=True)
                mode = mode_of_new(draft / "new")
                yield draft
                for file in (path for path in draft.rglob("*") if path.is_file()):
                    file.chmod(mode)  # safetensors closes its own to others
                manifest.seal(draft)
                _remove(place)
                draft.rename(place)
                sync(place.parent)
            finally:
                _remove(draft)

    def last_checkpoint(
        self, stage: str, warn: Callable[[str], None] = tell
    ) -> tuple[LoopState, dict[str, torch.Tensor]] | None:
        """The content of `newest_checkpoint`, or None."""
        place = self.newest_checkpoint(stage, warn)
        return None if place is None else self.read_checkpoint(place)

    def newest_checkpoint(self, stage: str, warn: Callable[[str], None] = tell) -> Path | None:
        """The newest checkpoint of a stage whose files are as they were written, or None where there is none at all.

        `warn` hears of each newer one that is damaged; `InputError` where all are.
        """
        damages = []
        for place in reversed(self._checkpoints(stage)):
            try:
                manifest.check(place)
            except InputError as error:
                damages.append(str(error))
                continue
            for damage in damages:
                warn(f"{damage}; this checkpoint is left out, the run goes on from {place.name}")
            return place
        if damages:
            raise InputError(
                f"{damages[0]}; none of the {len(damages)} checkpoints of stage '{stage}' is whole: "
                f"remove {self.checkpoints / stage}-* to begin the stage again"
            )
        return None

    def read_checkpoint(self, place: Path) -> tuple[LoopState, dict[str, torch.Tensor]]:
        """What `save_checkpoint` wrote there; `InputError` where it is something else."""
        file = place / "loop.json"
        try:
            state = LoopState(**_read_json(file))
        except TypeError:
            raise InputError(f"{file}: not the loop state of this version; remove the folder {place}") from None
        if place.name != _name(state):
            raise InputError(f"{file}: is of {_name(state)}, not of {place.name}")
        return state, self.load_parts(place / "state.safetensors")

    def go_on_from(self, state: LoopState) -> None:
        """Drops what was written after a checkpoint: later lines of the history, and later checkpoints, damaged all."""
        self.forget_after(state.records)
        for place in self._checkpoints(state.stage):
            if place.name > _name(state):
                _remove(place)

    def _checkpoints(self, stage: str) -> list[Path]:
        return sorted(self.checkpoints.glob(f"{stage}-" + STEP_DIGITS * "[0-9]"))

    def parts_file(self, name: str) -> Path:
        """Where the trained parameters of a finished stage, or the best so far, are kept."""
        return self.checkpoints / f"{name}.safetensors"

    def save_parts(self, file: Path, parts: dict[str, torch.Tensor]) -> None:
        """Writes trained parameters by name, atomically."""
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(file, parts)

    def load_parts(self, file: Path) -> dict[str, torch.Tensor]:
        """What `save_parts` wrote; `InputError` where the file is damaged or not such a file."""
        return load_tensors(file)

    def has_parts(self, file: Path, warn: Callable[[str], None] = tell) -> bool:
        """Whether `save_parts` wrote there, and the file is whole; `warn` hears of one that is not."""
        if not file.exists():
            return False
        try:
            load_tensors(file)
        except InputError as error:
            warn(str(error))
            return False
        return True

    def write_batch(self, record: dict[str, Any]) -> None:
        """Writes not_finite.json: where loss or gradient was not finite, and on which users or items."""
        write_whole(self.batch_file, json.dumps(record) + "\n")

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Writes metrics.json, the sign that the run has finished."""
        write_whole(self.path / METRICS, json.dumps(metrics, indent=2) + "\n")

    def publish(self, config: RunConfig) -> None:
        """Copies the finished run to where its config wants it, metrics.json last of all."""
        if config.upload:
            upload(self.path, config.upload, METRICS, without=("checkpoints", "ray", "wandb"))

    def metrics(self) -> dict[str, Any] | None:
        """The final metrics, or None while the run has not finished."""
        file = self.path / METRICS
        return _read_json(file) if file.exists() else None


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:  # no JSON, or no UTF-8
        raise InputError(f"{file}: not valid JSON ({error})") from None


def _name(state: LoopState) -> str:
    return f"{state.stage}-{state.step:0{STEP_DIGITS}d}"


def _open_no_link(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NOFOLLOW, 0o666)


def _remove(place: Path) -> None:
    """A file, a folder with all in it, or a link but not what it leads to."""
    if place.is_symlink() or place.is_file():
        place.unlink()
    else:
        shutil.rmtree(place, ignore_errors=True)
