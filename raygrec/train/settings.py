"""The whole config of a run, checked once before anything starts."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator, PositiveInt, model_validator

from raygrec.config import StrictConfig, validate
from raygrec.errors import InputError
from raygrec.evaluate.sequential import SequentialConfig
from raygrec.graph.lightgcn import LightGCNConfig
from raygrec.model.backbone import BackboneConfig
from raygrec.model.galrec import GALRecConfig
from raygrec.model.glta import GLTAConfig
from raygrec.model.text_tuning import TextTuningConfig
from raygrec.remote import checked, is_address
from raygrec.train.engine import EngineConfig


def _place(value: object) -> Path | str:
    if not isinstance(value, str | Path):
        raise ValueError("expected a path, or an address such as s3://bucket/folder")
    return _address(value) if is_address(value) else Path(value)


def _path(value: object) -> object:
    if is_address(value):
        raise ValueError("a run is written to a path that all nodes share; `upload` takes an address to copy it to")
    return value


def _address(value: object) -> str:
    try:
        return checked(str(value))
    except InputError as error:
        raise ValueError(str(error)) from None


def _workers(value: object) -> int | tuple[int, int]:
    numbers = (value, value) if isinstance(value, int) else value
    whole = isinstance(numbers, list | tuple) and all(type(number) is int for number in numbers)
    if not whole or len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1]:
        raise ValueError("expected a number of workers, or [fewest, most]")
    return value if isinstance(value, int) else (numbers[0], numbers[1])


Workers = Annotated[int | tuple[int, int], BeforeValidator(_workers)]
Place = Annotated[Path | str, PlainValidator(_place), PlainSerializer(str)]
Address = Annotated[str, BeforeValidator(_address)]


class StageConfig(StrictConfig):
    """One pass of the loop: how long, how fast, in what portions."""

    epochs: int = Field(1, ge=0)
    lr: float = Field(2e-3, gt=0)
    warmup: float = Field(0.05, ge=0, le=1)
    """Share of the steps over which the rate rises; then it falls along a cosine to zero."""
    batch: int = Field(256, ge=1)
    """Prompts per update over all workers: the result does not depend on the number of workers, but for GAL-Rec's
    contrast where `micro_batch` is smaller: its in-batch candidates are those of one pass of all workers."""
    micro_batch: int = Field(256, ge=1)
    """Prompts per worker and pass, or one more where they do not go up; more of them make gradient accumulation."""
    evaluate_every: int = Field(1, ge=1)
    """Epochs between validations (stage 3)."""
    patience: int = Field(3, ge=1)
    """Validations without improvement before stage 3 ends."""
    checkpoint_every: int = Field(200, ge=1)
    """Updates between checkpoints, besides one at the end of each epoch."""


class EvaluateConfig(StrictConfig):
    """How the full ranking is made."""

    ks: tuple[PositiveInt, ...] = Field((5, 10), min_length=1)
    decoding: Literal["first", "slots", "autoregressive"] = "first"
    """`first`: top-k of the first slot; `slots`: top item of each slot; `autoregressive`: each item fed back."""
    batch: int = Field(512, ge=1)
    """Users per worker and pass."""
    valid_users: int | None = Field(None, ge=1)
    """At most so many users, drawn once, in validations; the test set is always read whole."""
    test: bool = True
    """Whether the finished run reads the test set; trials of a sweep do not."""


class ClusterConfig(StrictConfig):
    """What a run asks of Ray; not read by a run in one process."""

    workers: Workers = 2
    """A number, or the fewest and the most: as many as there is room for, at each start and whenever that changes."""
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0)
    max_failures: int = Field(3, ge=0)
    """Restarts of the worker group before the run is given up."""
    max_preemptions: int = Field(-1, ge=-1)
    """Restarts because a node was taken away with notice, which do not count as failures; −1: any number."""
    stall_seconds: float = Field(600, gt=0)
    """After so long without a step, the worker that the others wait for is named; after as long again, it is ended."""

    @property
    def fewest(self) -> int:
        """Workers without which the run does not begin."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        """Workers that it has room for."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class TrackConfig(StrictConfig):
    """Where live figures of the training go besides history.jsonl; Ray's own metrics have them in any case."""

    every: int = Field(10, ge=1)
    """Updates between two points; each validation is one, too."""
    tensorboard: bool = False
    """Event files in RUN/tensorboard."""
    mlflow: str | None = Field(None, min_length=1)
    """The URI of a tracking server or store."""
    wandb: str | None = Field(None, min_length=1)
    """A project of Weights & Biases."""


class RunConfig(StrictConfig):
    """What every recipe's run depends on; written to its folder as config.yaml."""

    recipe: str
    store: Place
    """A path, or an address (s3://…, gs://…, file://…) that every node fetches it from."""
    out: Annotated[Path, BeforeValidator(_path)]
    """The run folder; on a cluster, a path that all nodes share."""
    upload: Address | None = None
    """An address that the finished run is copied to, without its checkpoints."""
    upload_checkpoints: bool = False
    """Whether each checkpoint is copied there too, in the background; `--resume` fetches them where `out` is gone."""
    seed: int = Field(0, ge=0, lt=2**63)
    graph: LightGCNConfig = LightGCNConfig()
    backbone: BackboneConfig = BackboneConfig()
    text_tuning: TextTuningConfig | None = None
    """[ours] How a copy of the language model is tuned on the graph before it makes the items' text vectors; without,
    they are of the pretrained one."""
    train: StageConfig = StageConfig(epochs=3)
    """The last stage; validation chooses among its parameters."""
    engine: EngineConfig = EngineConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="after")
    def _checkpoints_have_an_address(self) -> Self:
        if self.upload_checkpoints and self.upload is None:
            raise ValueError("upload_checkpoints=true needs an address in upload")
        return self

    @model_validator(mode="after")
    def _trains(self) -> Self:
        if self.recipe != "graph" and not self.train.epochs:
            raise ValueError(f"train.epochs=0: recipe {self.recipe} trains for one epoch at least")
        return self

    @property
    def name(self) -> str:
        """The method, as tables name it."""
        return self.recipe

    def _named(self, name: str) -> str:
        """With what the texts' reader was tuned on, where it was."""
        if self.text_tuning is None or not self.reads_texts:
            return name
        return name.replace("text", "tuned text") if "text" in name else f"{name} + tuned texts"

    @property
    def needs_order(self) -> bool:
        """Whether histories must be in time order."""
        return True

    @property
    def reads_graph(self) -> bool:
        """Whether node embeddings are pretrained."""
        return True

    @property
    def reads_backbone(self) -> bool:
        """Whether there is a language model at all."""
        return True

    @property
    def reads_texts(self) -> bool:
        """Whether the model reads the items' text vectors."""
        return True


class OnePositionRun(RunConfig):
    """A recipe whose prompts have no answer slots."""

    @model_validator(mode="after")
    def _has_no_slots(self) -> Self:
        if self.evaluate.decoding == "slots":
            raise ValueError(
                f"evaluate.decoding=slots: {self.name} answers at one position; use first or autoregressive"
            )
        return self


class GLTARun(RunConfig):
    """Item-text alignment, then user-item alignment, around a frozen language model."""

    recipe: Literal["glta"] = "glta"
    model: GLTAConfig = GLTAConfig()
    alignment: StageConfig = StageConfig(batch=32, micro_batch=32)
    """Stage 2, item-text alignment."""
    histories: StageConfig = StageConfig(epochs=4)
    """The first part of stage 3, on the histories alone, where `model.history_loss` applies; `train` is the rest."""

    @property
    def name(self) -> str:
        return self._named("GLTA")

    @property
    def needs_order(self) -> bool:
        return self.text_tuning is not None

    @property
    def reads_texts(self) -> bool:
        return self.model.text_vectors

    @model_validator(mode="after")
    def _lists_fit_slots(self) -> Self:
        if self.evaluate.decoding == "slots" and self.model.slots < max(self.evaluate.ks):
            raise ValueError(
                f"evaluate.decoding=slots ranks one item per slot: model.slots is {self.model.slots}, "
                f"lists of {max(self.evaluate.ks)} need as many"
            )
        return self


class GALRecRun(OnePositionRun):
    """Fine-tuning of the language model on hop prompts."""

    recipe: Literal["galrec"] = "galrec"
    model: GALRecConfig = GALRecConfig()

    @property
    def name(self) -> str:
        return self._named(self.model.name)

    @property
    def reads_graph(self) -> bool:
        return self.model.graph_vectors

    @property
    def reads_texts(self) -> bool:
        return self.model.text_vectors


class SequentialRun(OnePositionRun):
    """A baseline that reads histories alone: SASRec, with text vectors or BSARec's filter where asked."""

    recipe: Literal["sequential"] = "sequential"
    model: SequentialConfig = SequentialConfig()

    @property
    def name(self) -> str:
        return self._named(self.model.name)

    @property
    def reads_graph(self) -> bool:
        return False

    @property
    def reads_backbone(self) -> bool:
        return self.model.text_vectors

    @property
    def reads_texts(self) -> bool:
        return self.model.text_vectors


class GraphRun(OnePositionRun):
    """A baseline that ranks by node embeddings: LightGCN, or RLMRec-Con with `graph.text_weight`.

    All that is trained is trained by the pretraining, in one process.
    """

    recipe: Literal["graph"] = "graph"

    @property
    def name(self) -> str:
        return self.graph.name

    @property
    def needs_order(self) -> bool:
        return self.text_tuning is not None

    @property
    def reads_backbone(self) -> bool:
        return self.graph.text_weight > 0

    @property
    def reads_texts(self) -> bool:
        return False


RECIPES: dict[str, type[RunConfig]] = {
    "glta": GLTARun,
    "galrec": GALRecRun,
    "sequential": SequentialRun,
    "graph": GraphRun,
}


def run_config(content: dict[str, Any], source: str) -> RunConfig:
    """The config of the recipe that `content` names (`glta` where it names none); `InputError` as `validate`."""
    recipe = content.get("recipe", "glta")
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise InputError(f"{source}: key 'recipe': expected one of {', '.join(RECIPES)} (got {recipe!r})")
    return validate(RECIPES[recipe], content, source)
