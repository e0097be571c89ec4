"""Frozen dataclasses that describe a run. They are static (hashable), so a jitted function may close over them.

Their defaults are those of `configs/*.py`, which list every key with its reason (a test holds the two together).
`from_config_dict` turns what a user gives into these dataclasses and refuses an unknown key and a missing one.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from lm_jax.errors import UserError, without_passwords

T = TypeVar("T")

_LARGEST = 10**300  # of whole numbers where a float is expected
_ADDRESS = re.compile(r"\w+://")
# Keys that take gs:// and s3:// in every command. A config class adds its own as `addresses`; the others are local.
_ADDRESSES = frozenset(
    "model models reference reverse_model judge_model forward reverse input eval_input seeds unlabelled prompts "
    "responses store reference_cache remote url".split()
)
SCHEDULES = ("cosine", "linear", "constant")
AUTO = "auto"
MU_DTYPES = (AUTO, "float32", "bfloat16")
FULL, NF4 = BASES = ("full", "nf4")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. Fields that a `kind` does not use keep their defaults.

    Names follow transformers' `rope_parameters`; `lm_jax.models.rope` has the formulas.
    """

    theta: float
    kind: str = "default"  # default | linear | dynamic | llama3 | yarn
    factor: float = 1.0
    original_max_position: int | None = None  # context length before scaling (dynamic, llama3, yarn)
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: derived from factor, mscale, mscale_all_dim
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a decoder computes: everything that changes the maths, nothing that does not (dtype, mesh, kernels)."""

    family: str  # llama | mistral | qwen2 | qwen3
    vocab_size: int
    num_layers: int
    d_model: int
    d_ff: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    norm_eps: float
    max_position: int  # tokens; the longest context that the checkpoint was configured for
    activation: str = "silu"  # silu | gelu | gelu_tanh | relu
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    layer_windows: tuple[int | None, ...] = ()  # one per layer: tokens a query sees, itself included; None: all

    def __post_init__(self):
        if not self.layer_windows:
            object.__setattr__(self, "layer_windows", (None,) * self.num_layers)
        if len(self.layer_windows) != self.num_layers:
            raise UserError(
                f"model config: {len(self.layer_windows)} layer windows for {self.num_layers} layers; give one a layer"
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model config: {self.num_heads} query heads are no multiple of {self.num_kv_heads} key/value heads"
            )

    @property
    def distinct_windows(self) -> tuple[int | None, ...]:
        """The windows that occur, in order of first appearance."""
        return tuple(dict.fromkeys(self.layer_windows))


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How a decoder computes it: none of these fields changes the result beyond rounding."""

    dtype: str = "float32"  # matmuls and activations: float32 | bfloat16; softmax, norms and losses are always fp32
    remat: str = "none"  # none | full | a name of lm_jax.models.decoder.REMAT_POLICIES
    attention: str = "auto"  # auto | a name of lm_jax.models.attention.IMPLEMENTATIONS
    logprob_chunk: int = 256  # tokens of a device that the head works on at one time; of a row in the weighing pass
    scan_unroll: int = 1  # layers that one iteration of the scan holds: more copy less and compile longer

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"config.dtype: {self.dtype!r} is not a dtype to train in; choose float32 or bfloat16")
        for name in ("logprob_chunk", "scan_unroll"):
            if getattr(self, name) < 1:
                raise UserError(f"config.compute.{name}: must be at least 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1 and takes what is left."""

    data: int = 1  # replicas of the parameters
    fsdp: int = -1  # parameters and batch cut along this axis
    tensor: int = 1  # heads, feed-forward and vocabulary cut along this axis


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """The shape of one forward pass, which scores or evaluates: [rows, row_length] tokens, packed."""

    rows: int = 8  # over all devices
    row_length: int = 2048  # tokens a row

    def __post_init__(self):
        _check_sizes(self, "config.batch")

    def rows_in(self, parts: int) -> int:
        """`rows`, rounded up to a multiple of the `parts` that a mesh cuts them into."""
        return -(-self.rows // parts) * parts


@dataclasses.dataclass(frozen=True)
class StepBatch:
    """What one optimiser step takes: `size` examples, in as many packed microbatches as they need."""

    unit: ClassVar[str]  # what an example is, in the plural: the key that counts them
    sequences: ClassVar[int]  # of an example

    rows_per_device: int = 1  # rows of a microbatch that a device works on at once; the result does not depend on it
    row_lengths: int = 3  # different lengths that rows may have, each of which is compiled; nor on this

    def __post_init__(self):
        _check_sizes(self, "config.batch")

    @property
    def size(self) -> int:
        """Examples of a step."""
        return getattr(self, self.unit)


@dataclasses.dataclass(frozen=True)
class PairBatch(StepBatch):
    unit, sequences = "pairs", 2

    pairs: int = 8  # of a step; an epoch's last step has what is left


@dataclasses.dataclass(frozen=True)
class ExampleBatch(StepBatch):
    unit, sequences = "examples", 1

    examples: int = 32  # of a step; an epoch's last step has what is left


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How many sequences are generated at a time, and how long they may get."""

    slots: int = 64  # sequences that decode side by side, over all devices
    max_length: int = 2048  # tokens of prompt and response; never more than the model's context
    chunk: int = 8  # tokens a sequence between two looks at what has finished

    def __post_init__(self):
        _check_sizes(self, "config.decode")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    learning_rate: float = 1e-05  # the peak
    schedule: str = "cosine"  # cosine | linear | constant, after the warm-up
    warmup_ratio: float = 0.03  # share of all steps
    final_ratio: float = 0.0  # learning rate at the last step as a share of the peak (cosine, linear)
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-08
    weight_decay: float = 0.0  # AdamW, on matrices only
    clip_norm: float = 1.0  # global gradient norm; 0 turns clipping off
    skip_limit: int = 5  # steps of a run that may be skipped for a loss or gradient that is not finite; 0: none
    mu_dtype: str = AUTO  # of first moments: float32 | bfloat16; auto: the parameters'

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise UserError(f"config.optim.schedule: unknown {self.schedule!r}; choose from {', '.join(SCHEDULES)}")
        for name in ("warmup_ratio", "final_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"config.optim.{name}: must lie in [0, 1], got {getattr(self, name)}")
        for name in ("learning_rate", "weight_decay", "clip_norm", "eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"config.optim.{name}: must not be negative, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"config.optim.{name}: must lie in [0, 1), got {getattr(self, name)}")
        if self.skip_limit < 0:
            raise UserError(f"config.optim.skip_limit: must not be negative, got {self.skip_limit}")
        if self.mu_dtype not in MU_DTYPES:
            raise UserError(f"config.optim.mu_dtype: unknown {self.mu_dtype!r}; choose from {', '.join(MU_DTYPES)}")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the projections of every layer; with rank 0 there are none and all parameters train."""

    rank: int = 0
    alpha: float = 32.0  # how strongly the adapters count: their product is scaled by alpha / rank
    targets: str = "all-linear"  # all-linear, or comma-separated module names of PEFT's with wildcards: q_proj,v_proj
    rslora: bool = False  # scale by alpha / sqrt(rank) (arXiv 2312.03732), which keeps large ranks learning
    dropout: float = 0.0  # share of an adapter's input that a training step leaves out; never elsewhere
    base: str = FULL  # the frozen projections: full, in the run's dtype; nf4, in 4 bits (QLoRA, arXiv 2305.14314)

    def __post_init__(self):
        if self.rank < 0:
            raise UserError(f"config.lora.rank: must be at least 1, or 0 to train all parameters; got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"config.lora.alpha: must be positive, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"config.lora.dropout: must lie in [0, 1), got {self.dropout}")
        if self.base not in BASES:
            raise UserError(f"config.lora.base: unknown {self.base!r}; choose from {', '.join(BASES)}")
        if self.base == NF4 and not self.rank:
            raise UserError(
                "config.lora.base=nf4: a quantised model cannot be trained itself, only adapters on it; give "
                "config.lora.rank, as 16, or leave it out"
            )

    @property
    def scale(self) -> float:
        """Of the product of the two factors."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = 100  # steps between saves; the last step is always saved
    keep: int = 2  # newest checkpoints kept
    remote: str | None = None  # gs:// or s3:// address of a copy to resume from elsewhere

    def __post_init__(self):
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"config.checkpoints.{name}: must be at least 1, got {getattr(self, name)}")


def _check_sizes(config: Any, where: str) -> None:
    """Raises UserError where a field is below 1."""
    for name, value in dataclasses.asdict(config).items():
        if value < 1:
            raise UserError(f"{where}.{name}: must be at least 1, got {value}")


def from_config_dict(cls: type[T] | types.UnionType, config: Mapping[str, Any], where: str = "config") -> T:
    """Builds dataclass `cls` from a mapping (ConfigDict or dict), recursively.

    Args:
      cls: or several of them (`A | B`), where presets have keys of their own: the one that has most of the keys.
      config: of a nested dataclass the keys that differ from its default will do.

    Raises:
      UserError: on an unknown key, a missing key, or a value of the wrong type, with its dotted name.
    """
    if isinstance(cls, types.UnionType):
        cls = max(typing.get_args(cls), key=lambda c: len({f.name for f in dataclasses.fields(c)} & set(config)))
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    values = {key: config[key] for key in config}
    if unknown := sorted(set(values) - set(fields)):
        raise UserError(f"{where}.{unknown[0]}: unknown key; known keys: {', '.join(sorted(fields))}")
    required = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(required - set(values)):
        raise UserError(f"{where}.{missing[0]}: missing key; set it in the config file or with --{where}.{missing[0]}=")
    for key, value in values.items():
        if isinstance(value, str) and _ADDRESS.match(value):
            if key not in _ADDRESSES and key not in getattr(cls, "addresses", ()):
                cure = ", and the address as config.checkpoints.remote" if "checkpoints" in fields else ""
                raise UserError(f"{where}.{key}: {without_passwords(value)}: give a local path{cure}")
    for name, value in values.items():
        if isinstance(value, Mapping) and dataclasses.is_dataclass(default := fields[name].default):
            values[name] = {**to_dict(default), **value}
    converted = {name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    return typing.cast(type[T], cls)(**converted)


def from_settings(cls: type[T], **settings: Any) -> T:
    """Builds dataclass `cls` from keyword arguments, nested ones as dicts: `optim={"learning_rate": 1e-5}`.

    The matmuls' dtype, `compute.dtype`, is `dtype` unless it is given, as in the config files.

    Raises:
      UserError: as `from_config_dict`.
    """
    if "dtype" in settings:
        settings["compute"] = {"dtype": settings["dtype"], **settings.get("compute", {})}
    return from_config_dict(cls, settings)


def _convert(hint: Any, value: Any, where: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if isinstance(option, type) and dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            return from_config_dict(option, value, where)
        if typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
            item = typing.get_args(option)[0]
            return tuple(_convert(item, v, f"{where}[{i}]") for i, v in enumerate(value))
        if option is float and isinstance(value, int) and not isinstance(value, bool):
            if abs(value) > _LARGEST:
                raise UserError(f"{where}: too large for a float ({value.bit_length()} bits); give a smaller number")
            return float(value)
        if isinstance(option, type) and isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return value
    if value is None:
        raise UserError(f"{where}: not set; give --{where}=VALUE")
    names = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    raise UserError(f"{where}: expected {names}, got {value!r}")


def split_names(text: str) -> list[str]:
    """What stands between the commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `from_config_dict`: nested plain dicts and lists, ready for JSON."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
