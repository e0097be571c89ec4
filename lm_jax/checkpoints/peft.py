"""Adapters in PEFT's format: read as part of a model, and written so that `peft.PeftModel.from_pretrained` loads them.

Read is LoRA on the projections that have adapters here (`lm_jax.models.lora`), whatever rank and alpha each module has.
Everything else that PEFT knows computes something else, and is refused by its name.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from safetensors.numpy import save_file

from lm_jax.checkpoints.directories import appears_whole, check_output, copy_side_files, write_card
from lm_jax.checkpoints.weight_files import STORED_DTYPES, Tensor, check_finite, listed, open_checkpoint
from lm_jax.checkpoints.weight_names import without_wrappers
from lm_jax.config import LoraConfig, ModelConfig
from lm_jax.distributed.processes import barrier
from lm_jax.errors import UserError
from lm_jax.models.linear import LORA_A, LORA_B
from lm_jax.models.lora import AdapterSpec, adapter_specs, adapter_table, all_adapters
from lm_jax.models.weights import flatten, nest
from lm_jax.sharding import to_host
from lm_jax.strict_json import dumps, read_json_object

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_CURE = "merge it in PEFT (merge_and_unload(), then save_pretrained) and give that directory"
# Settings that change nothing in what a trained adapter computes, or that are read here
_READ = frozenset(
    """
    base_model_name_or_path r lora_alpha use_rslora alpha_pattern rank_pattern target_modules exclude_modules
    layers_to_transform layers_pattern auto_mapping peft_version inference_mode lora_dropout megatron_core
    qalora_group_size loftq_config eva_config corda_config lora_ga_config runtime_config ensure_weight_tying
    """.split()
)
_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", "FEATURE_EXTRACTION", None),
    "bias": ("none", None),
    "revision": ("main", None),
    # The others change the base model itself when the adapter is put on it
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.\w+)?\.weight")


class _Factors(NamedTuple):
    """Of one module: `a` [r, in] and `b` [out, r], whose product is scaled."""

    a: Tensor
    b: Tensor
    scale: float


class PeftAdapter:
    """An adapter on disk: its settings checked, its weights mapped.

    Attributes:
      base: what the settings name as its model.
      weights: the file of the factors.

    Raises:
      UserError: damaged files, or an adapter of another kind, by the setting's name.
    """

    def __init__(self, directory: Path):
        self._where, self._settings = directory / SETTINGS, read_json_object(directory / SETTINGS)
        for key in (*_ONLY, *self._settings):
            value = self._settings.get(key)
            if not (value in _ONLY[key] if key in _ONLY else key in _READ or not value):
                raise UserError(f"{self._where}: {key}={value!r} is not read (LoRA without it is); {_CURE}")
        self.base: str = self._settings.get("base_model_name_or_path") or ""
        if not isinstance(self.base, str) or not self.base:
            raise UserError(
                f"{self._where}: names no base model; set base_model_name_or_path to its directory or hub id"
            )
        self.weights = directory / WEIGHTS
        if not self.weights.exists() and any(directory.glob("adapter_model.*")):
            raise UserError(
                f"{directory}: the adapter is no safetensors file; in PEFT load it and save_pretrained again"
            )
        self._tensors = open_checkpoint(self.weights).tensors

    @property
    def scaled_by(self) -> str:
        """All that the factors' scales depend on besides their ranks."""
        return repr([self._settings.get(key) for key in ("lora_alpha", "alpha_pattern", "use_rslora")])

    def lora(self, config: ModelConfig) -> LoraConfig:
        """How the adapter is joined with a model: the largest rank of its modules; scales are in the factors.

        Raises:
          UserError: adapters on other modules, or that do not fit their shapes.
        """
        found = self._factors(config)
        rank = max(factors.a.shape[0] for factors in found.values())
        modules = {
            spec.module: None
            for spec in all_adapters(config, rank)
            for name in self._modules(spec, config)
            if name in found
        }
        return LoraConfig(rank=rank, alpha=float(rank), targets=",".join(modules), rslora=False)

    def load(self, config: ModelConfig, mesh: jax.sharding.Mesh) -> dict:
        """The factors, fp32, cut over the mesh and in the shape that `abstract_adapters` gives for `lora`.

        What has a smaller rank, or no adapter in some layer, is filled up with zeros.
        """
        lora, found = self.lora(config), self._factors(config)
        specs, flat = adapter_specs(config, lora, mesh), {}
        for spec in adapter_table(config, lora):
            for path, x in self._stacked(spec, config, found):
                sharding = NamedSharding(mesh, specs[path])
                flat[path] = jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
        return nest(flat)

    def _stacked(
        self, spec: AdapterSpec, config: ModelConfig, found: Mapping[str, _Factors]
    ) -> Iterator[tuple[str, np.ndarray]]:
        shapes = {path: shape for path, (_, shape) in spec.shapes(config).items()}
        (path_a, shape_a), (path_b, shape_b) = shapes.items()
        a = np.zeros((config.num_layers, np.prod(shape_a[1:-1], dtype=int), spec.rank), np.float32)
        b = np.zeros((config.num_layers, spec.rank, np.prod(shape_b[2:], dtype=int)), np.float32)
        for layer, name in enumerate(self._modules(spec, config)):
            if factors := found.get(name):
                rank = factors.a.shape[0]
                a[layer, :, :rank] = factors.a.array.astype(np.float32).T
                b[layer, :rank] = factors.scale * factors.b.array.astype(np.float32).T
                for x in (a[layer], b[layer]):
                    check_finite(x, f"{name}.lora", self._where.parent)
        yield from ((path_a, a.reshape(shape_a)), (path_b, b.reshape(shape_b)))

    @staticmethod
    def _modules(spec: AdapterSpec, config: ModelConfig) -> list[str]:
        return [name.removesuffix(".weight") for name in spec.kernel.hf_names(config)]

    def _factors(self, config: ModelConfig) -> dict[str, _Factors]:
        sides: dict[str, dict[str, Tensor]] = {}
        strange = []
        for name, tensor in self._tensors.items():
            plain = re.sub(
                r"^(model\.)?(?=layers\.)", "model.", without_wrappers(name).removeprefix("base_model.model.")
            )
            if match := _FACTOR.fullmatch(plain):
                sides.setdefault(match["module"], {})[match["side"]] = tensor
            else:
                strange.append(plain)
        kernels = {name: spec for spec in all_adapters(config, 1) for name in self._modules(spec, config)}
        strange += [name for name in sides if name not in kernels]
        if strange:
            raise UserError(
                f"{self._where.parent}: {listed(strange)}: only LoRA on the projections of {self.base}'s "
                f"{config.num_layers} layers is read; {_CURE}"
            )
        found = {}
        for name, spec in kernels.items():
            if name in sides:
                found[name] = self._pair(name, sides[name], [*reversed(spec.kernel.hf_shape(config))])
        self._check_targets(kernels, found)
        return found

    def _pair(self, name: str, sides: Mapping[str, Tensor], sizes: list[int]) -> _Factors:
        a, b = sides.get("A"), sides.get("B")
        fits = a and b and (a.shape[1:], b.shape[:1]) == ((sizes[0],), (sizes[1],)) and a.shape[0] == b.shape[-1] > 0
        if a is None or b is None or not fits or not {a.dtype, b.dtype} <= STORED_DTYPES.keys():
            given = {side: f"{x.dtype} {x.shape}" for side, x in sides.items()}
            raise UserError(
                f"{self._where.parent}: {name}: lora_A [r, {sizes[0]}] and lora_B [{sizes[1]}, r] expected, found "
                f"{given}; is it an adapter of another model than {self.base}?"
            )
        patterns = self._settings.get("alpha_pattern") or {}
        # As PEFT matches them; the rank is that of the tensors, which `rank_pattern` says too
        alpha = next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", name)), None)
        alpha = self._settings.get("lora_alpha", 8) if alpha is None else alpha
        rank = a.shape[0]
        return _Factors(a, b, alpha / (rank**0.5 if self._settings.get("use_rslora") else rank))

    def _check_targets(self, kernels: Mapping[str, AdapterSpec], found: Mapping[str, _Factors]) -> None:
        targets, some = self._settings.get("target_modules"), ("layers_to_transform", "exclude_modules")
        if isinstance(targets, list) and not any(self._settings.get(key) for key in some):
            if lost := [name for name, spec in kernels.items() if spec.module in targets and name not in found]:
                raise UserError(
                    f"{self._where.parent}: {listed(lost)} without the adapter that {SETTINGS} names; copy it whole"
                )
        if not found:
            raise UserError(f"{self._where.parent}: holds no adapters; give the base model {self.base} itself")


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter in PEFT's format.

    Raises:
      UserError: it holds a whole model too.
    """
    found = (directory / SETTINGS).is_file()
    if found and any(directory.glob("model*.safetensors")):
        raise UserError(f"{directory}: holds a model and an adapter ({SETTINGS}); move the one that is not meant away")
    return found


def export_peft(
    adapters: Mapping[str, Any],
    config: ModelConfig,
    lora: LoraConfig,
    output_dir: str | Path,
    source_dir: str | Path,
    base: str,
    card: str | None = None,
) -> None:
    """Writes adapter_config.json, adapter_model.safetensors (fp32) and the tokenizer. All processes call it.

    Args:
      adapters: sharded in any way.
      output_dir: local, gs:// or s3://, absent or empty. It appears whole or not at all.
      source_dir: the tokenizer, chat template and generation config are copied from here.
      base: how PEFT finds the model that the adapters belong to: a directory or a hub id.
      card: text of its README.md.

    Raises:
      UserError: the output exists and is not empty.
    """
    check_output(output_dir)
    host = to_host(adapters)
    if jax.process_index() == 0:
        with appears_whole(output_dir) as partial:
            save_file(peft_tensors(host, config, lora), partial / WEIGHTS, metadata={"format": "pt"})
            settings = dumps(_settings(config, lora, base), indent=2) + "\n"
            (partial / SETTINGS).write_text(settings, encoding="utf-8")
            copy_side_files(source_dir, partial)
            write_card(card, partial)
    barrier("the end of the export")


def peft_tensors(adapters: Mapping[str, Any], config: ModelConfig, lora: LoraConfig) -> dict[str, np.ndarray]:
    """The tensors of PEFT's adapter_model.safetensors: A as [r, in], B as [out, r], one of each a layer and target.

    Args:
      adapters: on the host.
    """
    flat, tensors = flatten(adapters), {}
    for spec in adapter_table(config, lora):
        parent = spec.kernel.path.rpartition("/")[0]
        a, b = (np.asarray(flat[f"{parent}/{name}"], np.float32) for name in (LORA_A, LORA_B))
        for layer, name in enumerate(spec.kernel.hf_names(config)):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a[layer].reshape(-1, spec.rank).T)
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(b[layer].reshape(spec.rank, -1).T)
    return tensors


def _settings(config: ModelConfig, lora: LoraConfig, base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": [spec.module for spec in adapter_table(config, lora)],
    }
