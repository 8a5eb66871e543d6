"""The one file that knows DeepSpeed: set-up, backward, update, and full state in and out.

Two engines with the same face: `LocalEngine` is plain torch in one process, `DeepSpeedEngine` runs ZeRO 0-3
over the process group that the launcher has made. State leaves and enters an engine as full fp32 tensors by
name, so a checkpoint knows neither the world size nor the ZeRO stage.
"""

import ctypes
import logging
import math
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any, Literal, Protocol, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from raygrec.config import StrictConfig
from raygrec.model.backbone import Backbone
from raygrec.ranks import device, name_accelerator, shard, world

MOMENTS = ("exp_avg", "exp_avg_sq")
CARRIED = "carried/"
FEW = 8  # workers, at most, to which gradients are sent one after the other
BUCKET = 500_000_000  # entries at most of the buffer in which DeepSpeed collects gradients to reduce them: its default

Beta = Annotated[float, Field(ge=0, lt=1)]


class EngineConfig(StrictConfig):
    """Optimizer, precision and how the state is spread over workers."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["fp32", "bf16"] = "fp32"
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    clip: float = Field(1.0, gt=0)
    """Largest norm of the global gradient."""
    activation_checkpointing: bool = False
    offload_optimizer: bool = False
    """Keeps the moments and fp32 weights in the CPU's memory, and updates there (ZeRO 1 to 3)."""
    offload_parameters: bool = False
    """Keeps the partitioned weights there too, between their uses (ZeRO-3)."""

    @model_validator(mode="after")
    def _offloads_what_is_partitioned(self) -> Self:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage=1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage=3")
        return self


class NonFiniteError(RuntimeError):
    """The loss or the gradient of a step was not finite; nothing was updated."""


class Engine(Protocol):
    """What the loop needs of an engine."""

    model: nn.Module
    device: torch.device

    def autocast(self) -> Any:
        """The context for forward passes outside `loss`."""

    def loss(self, *arguments: object) -> torch.Tensor:
        """The model's forward, through the engine."""

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Adds the gradient of `loss`, which sums over ranks; `last` marks the step's last micro-batch."""

    def update(self, lr: float) -> float:
        """Clips, steps with learning rate `lr` and returns the gradient norm before clipping."""

    def state(self, keep: bool = True) -> dict[str, torch.Tensor]:
        """Full fp32 parameters (`param/…`) and AdamW moments (`exp_avg/…`, `exp_avg_sq/…`); collective.

        keep: whether this rank wants them; nothing is there where it does not.
        """

    def load_state(self, tensors: dict[str, torch.Tensor], steps: int, arguments: tuple[object, ...]) -> None:
        """The inverse of `state`, after `steps` updates, on every rank; `arguments` are any valid ones of `loss`."""


def peak_memory_mib() -> float:
    """Peak memory of this worker in MiB: of its GPU where it has one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def give_back_memory() -> None:
    """Returns to the system what the C library keeps of memory that was freed, where that is glibc.

    Batches of ever new lengths leave holes in its heap that later ones do not fit: a process grows from epoch to epoch,
    by half its size and more, though nothing in it does.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def loading(config: EngineConfig, distributed: bool) -> Iterator[None]:
    """Inside, `from_pretrained` partitions the weights as it loads where ZeRO-3 asks for it."""
    if not (distributed and config.zero_stage == 3):
        yield
        return
    _import_deepspeed()
    from transformers.integrations import HfDeepSpeedConfig

    handle = HfDeepSpeedConfig(_deepspeed_settings(config, accumulation=1))
    yield
    del handle


def full_tensor(parameter: nn.Parameter) -> torch.Tensor:
    """A copy of a parameter that may be partitioned; collective where it is."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def frozen_matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    """Those of the language model that stay as they are, and their biases.

    Autocast would keep them twice as large as bf16, and cast them anew at every use, to the same values. What it reads
    in fp32 (norms, token table) is not among them, nor is what a later stage may train.
    """
    for backbone in (module for module in model.modules() if isinstance(module, Backbone)):
        for layer in (module for module in backbone.modules() if isinstance(module, nn.Linear)):
            yield from (parameter for parameter in layer.parameters(recurse=False) if not parameter.requires_grad)


def _frozen_in_bf16(model: nn.Module) -> None:
    for parameter in frozen_matrices(model):
        parameter.data = parameter.data.bfloat16()


def make_engine(model: nn.Module, config: EngineConfig, accumulation: int, distributed: bool) -> Engine:
    """The engine for `model`'s trainable parameters; `accumulation` micro-batches make one update."""
    if config.activation_checkpointing:
        for module in model.modules():
            if isinstance(module, Backbone):
                module.checkpoint()
    return DeepSpeedEngine(model, config, accumulation) if distributed else LocalEngine(model, config)


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _adamw(model: nn.Module, config: EngineConfig) -> torch.optim.AdamW:
    shares: dict[str, float] = getattr(model, "lr_shares", {})  # by prefix of a parameter's name
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in _trainable(model).items():
        share = next((share for prefix, share in shares.items() if name.startswith(prefix)), 1.0)
        groups.setdefault(share, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "lr_share": share} for share, parameters in groups.items()],
        lr=0.0,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,  # one pass over memory where the plain one takes a dozen
    )


class LocalEngine:
    """Plain torch in one process: fp32, or bf16 autocast over weights that are fp32 where they are trained."""

    def __init__(self, model: nn.Module, config: EngineConfig) -> None:
        self.device = device()
        if config.precision == "bf16":
            _frozen_in_bf16(model)
        self.model = model.to(self.device)
        self.config = config
        self.optimizer = _adamw(model, config)

    def autocast(self) -> Any:
        if self.config.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def loss(self, *arguments: object) -> torch.Tensor:
        with self.autocast():
            return self.model(*arguments)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def update(self, lr: float) -> float:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = _finite(nn.utils.clip_grad_norm_(parameters, self.config.clip))
        _set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self, keep: bool = True) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in _trainable(self.model).items():
            tensors[f"param/{name}"] = parameter.detach().cpu().clone()
            for moment, value in self.optimizer.state.get(parameter, {}).items():
                if moment in MOMENTS:
                    tensors[f"{moment}/{name}"] = value.cpu().clone()
        return tensors | _carried(self.model)

    def load_state(self, tensors: dict[str, torch.Tensor], steps: int, arguments: tuple[object, ...]) -> None:
        for name, parameter in _trainable(self.model).items():
            parameter.data.copy_(tensors[f"param/{name}"])
            if f"exp_avg/{name}" in tensors:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(steps), device=self.device),
                    **{moment: tensors[f"{moment}/{name}"].to(self.device, copy=True) for moment in MOMENTS},
                }
        _load_carried(self.model, tensors)


class DeepSpeedEngine:
    """DeepSpeed over the current process group; without ZeRO, bf16 is the `LocalEngine`'s."""

    def __init__(self, model: nn.Module, config: EngineConfig, accumulation: int) -> None:
        _import_deepspeed()
        import deepspeed

        self.config = config
        self.accumulation = accumulation
        self.world_size = world()[1]
        self.device = device()
        self._deepspeed = deepspeed
        if config.precision == "bf16":
            # On a GPU, DeepSpeed turns off the autocast that it finds around its forward: this one is inside.
            model.forward = self.autocast()(model.forward)
        if config.precision == "bf16" and config.zero_stage == 0:
            _frozen_in_bf16(model)
        if config.precision == "bf16" and config.zero_stage == 3:
            # As DeepSpeed does in the other stages; here it would keep in fp32 what it has not loaded itself.
            for parameter in model.parameters():
                if not hasattr(parameter, "ds_id"):
                    parameter.data = parameter.data.bfloat16()
        optimizer = _adamw(model, config)
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in _trainable(model).values())
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model.to(self.device),
            optimizer=optimizer,
            config=_deepspeed_settings(config, accumulation, min(trained, BUCKET)),
            dist_init_required=False,
        )
        self.model: nn.Module = self.engine.module
        if config.zero_stage == 3 and hasattr(self.model, "release"):
            self.model.release = self.optimizer.empty_partition_cache
        self._moments_linked = False

    def autocast(self) -> Any:
        # Under ZeRO 1 to 3 DeepSpeed casts parameters to bf16 and leaves buffers in fp32.
        if self.config.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def loss(self, *arguments: object) -> torch.Tensor:
        return self.engine(*arguments)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        # DeepSpeed averages over ranks and micro-batches; both factors are taken out again, since the loss is
        # divided by global counts already.
        self.engine.backward(loss * (self.world_size * self.accumulation))
        if not last:
            self.engine.step()  # DeepSpeed counts micro-batches here; it updates at the last one only

    def update(self, lr: float) -> float:
        _set_lr(self.engine.basic_optimizer, lr)
        _set_lr(self.optimizer, lr)
        plain = [p.grad for p in _trainable(self.model).values() if p.grad is not None and not self._partitioned(p)]
        norm = _finite(nn.utils.get_total_norm(plain)) if plain else None
        self.engine.step()
        self._link_moments()
        # Under ZeRO 1 to 3 DeepSpeed itself leaves the update out where the norm is not finite, and says inf.
        return _finite(self.engine.get_global_grad_norm()) if norm is None else norm

    def state(self, keep: bool = True) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in _trainable(self.model).items():
            for kind in ("param", *MOMENTS):
                value = self._full(parameter, kind)
                if value is not None and keep:
                    tensors[f"{kind}/{name}"] = value.detach().float().cpu().clone()
        return tensors | _carried(self.model, keep)

    def load_state(self, tensors: dict[str, torch.Tensor], steps: int, arguments: tuple[object, ...]) -> None:
        if any(name.startswith("exp_avg/") for name in tensors):
            self._make_moments(arguments)
        for name, parameter in _trainable(self.model).items():
            for kind in ("param", *MOMENTS):
                if f"{kind}/{name}" in tensors:
                    self._set_full(parameter, kind, tensors[f"{kind}/{name}"].to(self.device))
        for state in self.engine.basic_optimizer.state.values():
            state["step"].fill_(steps)
        _load_carried(self.model, tensors)

    def _link_moments(self) -> None:
        """ZeRO 1 and 2 link the moments once the first parameter group has some, when the other groups have none."""
        if not self._moments_linked and hasattr(self.optimizer, "_hp_optimizer_states_linked"):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()
        self._moments_linked = True

    def _partitioned(self, parameter: nn.Parameter) -> bool:
        return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")

    def _full(self, parameter: nn.Parameter, kind: str) -> torch.Tensor | None:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if not self._partitioned(parameter):
            return parameter if kind == "param" else self.engine.basic_optimizer.state.get(parameter, {}).get(kind)
        if kind == "param":
            return safe_get_full_fp32_param(parameter)
        if not self.engine.basic_optimizer.state:
            return None
        return safe_get_full_optimizer_state(parameter, kind)

    def _set_full(self, parameter: nn.Parameter, kind: str, value: torch.Tensor) -> None:
        from deepspeed import utils

        if not self._partitioned(parameter):
            target = parameter.data if kind == "param" else self.engine.basic_optimizer.state[parameter][kind]
            target.copy_(value)
            return
        set_param, set_moment, part = utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state, value
        if hasattr(parameter, "ds_id"):  # ZeRO-3, whose setters of whole values want sizes that the workers divide
            set_param, set_moment = utils.safe_set_local_fp32_param, utils.safe_set_local_optimizer_state
            part = shard(value, parameter.ds_tensor.numel())
        if kind == "param":
            set_param(parameter, part)
            # DeepSpeed would refresh the model's own copy at the next update only.
            with self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        else:
            set_moment(parameter, part, kind)

    def _make_moments(self, arguments: tuple[object, ...]) -> None:
        """Updates once with zero gradients and lr 0: DeepSpeed makes and links the moments only in an update."""
        for micro in range(self.accumulation):
            self.backward(0.0 * self.loss(*arguments).sum(), micro == self.accumulation - 1)
        self.update(0.0)


def _finite(norm: torch.Tensor | float) -> float:
    if not math.isfinite(norm):
        raise NonFiniteError(f"the gradient norm is {float(norm)}")
    return float(norm)


def _carried(model: nn.Module, keep: bool = True) -> dict[str, torch.Tensor]:
    """What a model carries from update to update besides parameters, under `carried/…`; nothing unless `keep`."""
    tensors = model.carried_state(keep) if hasattr(model, "carried_state") else {}
    return {f"{CARRIED}{name}": value for name, value in tensors.items()}


def _load_carried(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    found = {name.removeprefix(CARRIED): value for name, value in tensors.items() if name.startswith(CARRIED)}
    if found:
        model.load_carried_state(found)


def _set_lr(optimizer: object, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_share"]


def _deepspeed_settings(config: EngineConfig, accumulation: int, bucket: int = BUCKET) -> dict[str, object]:
    zero: dict[str, object] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": bucket,
        # A gradient is added up where it is needed (half the bytes), unless that makes many small messages.
        "use_multi_rank_bucket_allreduce": world()[1] > FEW,
        "stage3_param_persistence_threshold": 0,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.clip,
        # Without ZeRO it would hide the fp32 weights and their moments in a wrapper that gives neither away.
        "bf16": {"enabled": config.precision == "bf16" and config.zero_stage > 0},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def _import_deepspeed() -> None:
    """DeepSpeed without what it logs from its import on and what it compiles on a CPU machine."""
    name_accelerator()
    warnings.filterwarnings("ignore", module="deepspeed")
    import deepspeed

    # Its all-reduce in shared memory is for inference alone, and would be compiled at the first start on a machine,
    # under a lock that a process killed meanwhile leaves behind for good: every later start there would hang.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
