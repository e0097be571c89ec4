"""Run directories, and opening a model from any place that a user may name.

A run directory holds `config.json` (the run's settings and what its card tells), `model/` (config.json, tokenizer and
templates of the starting checkpoint, without weights), `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `plots/` and,
where asked for, `profile/` and `loggers.json` (what the run is called in other places).
"""

import dataclasses
import functools
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.sharding import NamedSharding

from lm_jax.checkpoints import hf as hf_io
from lm_jax.checkpoints import mirror
from lm_jax.checkpoints.buckets import is_remote
from lm_jax.checkpoints.checksums import item_fingerprint
from lm_jax.checkpoints.directories import (
    GGUF,
    copy_side_files,
    directory_with_tokenizer,
    holds_model,
    resolve_model_dir,
)
from lm_jax.checkpoints.fingerprints import config_told, weights_fingerprint
from lm_jax.checkpoints.gguf_tokenizer import gguf_directory
from lm_jax.checkpoints.lock import NAME, lock
from lm_jax.checkpoints.orbax import Checkpoints
from lm_jax.checkpoints.peft import PeftAdapter, is_adapter
from lm_jax.checkpoints.provenance import Method, made_with, origin
from lm_jax.checkpoints.settings import Contents, check_same_settings, read_settings, write_settings
from lm_jax.config import FULL, NF4, LoraConfig, ModelConfig, from_config_dict
from lm_jax.console import say
from lm_jax.distributed.processes import at_work, everywhere, moving, reached
from lm_jax.errors import UserError
from lm_jax.models.lora import abstract_adapters, merge, stack
from lm_jax.models.quantized import is_quantized, leaf_specs, leaves, quantize_params, replacement
from lm_jax.models.registry import read_model_config, weight_table
from lm_jax.models.weights import nest
from lm_jax.sharding import padded_shape, param_spec

# Where a run lies, on what it computes and when it gives up may change between a run and its continuation; what it
# learns may not.
_SAVING = ("checkpoints.every", "checkpoints.keep")
_MAY_CHANGE = ("output", "mesh", "compute", *_SAVING, "loggers", "profile", "reference_cache", "optim.skip_limit")


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model on disk: a Hugging Face directory, a GGUF file, a PEFT adapter, or a checkpoint of a run.

    Attributes:
      name: where it is found, from any working directory: an absolute path, a hub id or an address.
      directory: has config.json and the tokenizer; in a run, its `model/`.
      weights: the directory, or the file, of the weights; of a run the run directory.
      config: what config.json says.
      run: the run directory, or None where it is none.
      step: the run's checkpoint, or None.
      base: of adapters, a run's or PEFT's: the model that they belong to.
      lora: how they are joined with it.
      precision: how `load_params` gives the projections: full, or nf4.
    """

    name: str
    directory: str
    weights: str
    config: ModelConfig
    run: str | None = None
    step: int | None = None
    base: "ModelSource | None" = None
    lora: LoraConfig | None = None
    precision: str = FULL

    def load_params(self, mesh: jax.sharding.Mesh, dtype: str) -> dict:
        """Parameters born sharded on `mesh` in `dtype`, adapters merged into them.

        Adapters that were trained on a base in nf4 are merged into the full one, so that the model is not exactly the
        one that was trained. Projections in nf4 are quantised one after the other as they are read; those of a run only
        once its model lies on the devices whole.

        Raises:
          UserError: files that are missing, damaged or do not fit the config or the mesh.
        """
        whole = self.run is None and self.base is None
        if self.precision == NF4 and not whole:
            full = dataclasses.replace(self, precision=FULL).load_params(mesh, "float32")
            return quantize_params(full, self.config, mesh, dtype)
        if self.base is not None and self.lora is not None:
            if self.lora.base == NF4:
                say(f"{self.run}: adapters of a base in nf4, merged into the full one: not exactly what was trained")
            return merge(self.base.load_params(mesh, dtype), self.load_adapters(mesh), self.lora)
        if whole:
            replace = replacement(self.config, mesh, dtype) if self.precision == NF4 else None
            shardings = param_shardings(self.config, mesh)
            with moving(self.weights):
                params = hf_io.load_params(self.weights, self.config, shardings, dtype, replace)
            reached("the end of loading the model")
            return params
        return self._restore(abstract_params(self.config, mesh, dtype))

    def load_adapters(self, mesh: jax.sharding.Mesh) -> dict:
        """The adapters, born sharded, fp32, where the model consists of some and a base; raises as `load_params`."""
        if self.lora is None:
            raise ValueError(f"{self.name}: has no adapters")
        if self.run is None:
            return PeftAdapter(Path(self.weights).parent).load(self.config, mesh)
        return self._restore(abstract_adapters(self.config, self.lora, mesh))

    @property
    def below(self) -> "ModelSource":
        """The model below all adapters."""
        return self if self.base is None else self.base.below

    def stacked_adapters(self, mesh: jax.sharding.Mesh) -> tuple[dict, LoraConfig, str]:
        """Adapters, those that they were trained on included, how they are joined, and the model below them all.

        Raises:
          UserError: there are none, or they belong to a run that has trained every parameter.
        """
        source, parts = self, []
        while source.base is not None and source.lora is not None:
            parts.append((source.load_adapters(mesh), source.lora))
            source = source.base
        if not parts:
            raise UserError(f"{self.name}: no run that trained adapters; leave config.adapter out")
        if source.run is not None:
            raise UserError(
                f"{self.name}: its adapters belong to the run {source.run}, which PEFT cannot load; leave "
                "config.adapter out to merge them, or train on a directory that export_hf made of that run"
            )
        return *(parts[0] if len(parts) == 1 else stack(parts, self.config)), source.name

    def _restore(self, abstract: dict) -> dict:
        with Checkpoints(f"{self.run}/checkpoints", keep=None) as checkpoints:
            return checkpoints.restore({"params": abstract}, self.step)["params"]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digits that change when the model does, and do not with its place, its files' times or its precision.

        Of weight files: what of config.json is computed with, and their tensors. Of a run: the same of config.json and
        the content of the checkpoint's parameters. Of adapters: their base and scale too.
        """
        digest = hashlib.sha256(config_told(self.config).encode())
        if self.run is None:
            digest.update(weights_fingerprint(hf_io.open_weights(Path(self.weights))).encode())
        else:
            digest.update(item_fingerprint(epath.Path(self.run) / "checkpoints" / str(self.step), "params").encode())
        if self.base is not None and self.lora is not None:
            scale = self.lora.scale if self.run else PeftAdapter(Path(self.weights).parent).scaled_by
            digest.update(f"{self.base.fingerprint} {scale}".encode())
        return digest.hexdigest()[:32]

    def content(self) -> dict[str, Any]:
        """As the settings of a run keep it, see `lm_jax.checkpoints.settings`."""
        return {"fingerprint": self.fingerprint, "step": self.step}


def open_model(model: str, step: int | None = None) -> ModelSource:
    """Finds a model: a directory in Hugging Face format, of a PEFT adapter or of a run, a GGUF file, or a hub id.

    What lies on the hub or in a bucket is downloaded.

    Args:
      step: which checkpoint of a run directory; None for the newest.

    Raises:
      UserError: nothing there, or an architecture that is not supported.
    """
    return _open(model, step, ())


def _open(model: str, step: int | None, above: tuple[str, ...]) -> ModelSource:
    """`open_model`, for the base of the adapters `above`."""
    name = model if is_remote(model) or not model or not epath.Path(model).exists() else os.path.abspath(model)
    if name in above:
        raise UserError(f"{name}: an adapter of itself; set base_model_name_or_path in its adapter_config.json")
    if is_remote(model):
        with at_work():
            model = str(mirror.cached_run(model.rstrip("/"), step) or model)
    root = epath.Path(model)
    if not is_remote(model) and (root / "checkpoints").is_dir() and (root / "model").is_dir():
        with Checkpoints(f"{model}/checkpoints", keep=None) as checkpoints:
            steps = checkpoints.steps()
        step = steps[-1] if step is None and steps else step
        if step not in steps:
            raise UserError(f"{model}: no checkpoint of step {step}; it has {steps or 'none'}; let the run save one")
        directory = str(root / "model")
        return ModelSource(name, directory, model, read_model_config(directory), model, step, *_base_of(root))
    if step is not None:
        raise UserError(f"{model}: config.step={step} was given but this is no run directory; leave it out")
    found = resolve_model_dir(model)
    if found.suffix == GGUF and found.is_file():
        directory = gguf_directory(found)
        return ModelSource(name, directory, str(found), read_model_config(directory))
    if is_adapter(found):
        return _open_adapter(name, found, (*above, name))
    return ModelSource(name, str(found), str(found), read_model_config(found))


def _open_adapter(name: str, directory: Path, above: tuple[str, ...]) -> ModelSource:
    adapter = PeftAdapter(directory)
    # From here, as PEFT finds it, from where the adapter lies, or on the hub
    places = [p for p in (adapter.base, f"{directory}/{adapter.base}") if holds_model(Path(p))] or [adapter.base]
    try:
        base = _open(places[0], None, above)
    except UserError as e:
        raise UserError(
            f"{directory}: an adapter of {adapter.base}: {e}; where that model lies elsewhere, set "
            "base_model_name_or_path in adapter_config.json"
        ) from e
    side = directory_with_tokenizer(directory, base.directory)
    return ModelSource(name, side, str(adapter.weights), base.config, base=base, lora=adapter.lora(base.config))


def _base_of(root: epath.Path) -> tuple[ModelSource | None, LoraConfig | None]:
    """What a run's adapters belong to, and their settings; of a run without adapters nothing."""
    settings = read_settings(root)
    if (base := settings.get("base")) is None:
        return None, None
    try:
        source = open_model(base["model"], base["step"])
    except UserError as e:
        raise UserError(f"{root}: its adapters need the model that they were trained on: {e}") from e
    if base.get("fingerprint", source.fingerprint) != source.fingerprint:  # older runs did not note it
        raise UserError(
            f"{root}: its adapters belong to other weights than {base['model']} holds now; put the model back that "
            "they were trained on"
        )
    return source, from_config_dict(LoraConfig, settings["config"]["lora"])


def param_specs(
    config: ModelConfig, mesh: jax.sharding.Mesh, precision: str = FULL
) -> dict[str, jax.sharding.PartitionSpec]:
    """Parameter path -> PartitionSpec, for every parameter of the family's weight table, its kernels in `precision`."""
    specs: dict[str, Any] = {}
    for s in weight_table(config):
        if precision == NF4 and is_quantized(s):
            specs |= leaf_specs(s, config, mesh)
        else:
            specs[s.path] = param_spec(s.path, s.axes, padded_shape(s.axes, s.shape(config), mesh), mesh)
    return specs


def param_shardings(config: ModelConfig, mesh: jax.sharding.Mesh) -> dict:
    """Nested NamedShardings in the shape of the parameters."""
    return nest({p: NamedSharding(mesh, spec) for p, spec in param_specs(config, mesh).items()})


def abstract_params(config: ModelConfig, mesh: jax.sharding.Mesh, dtype: str, precision: str = FULL) -> dict:
    """ShapeDtypeStructs of the parameters with their shardings, and no array; `precision` as `ModelSource` has it."""
    specs, flat = param_specs(config, mesh, precision), {}
    for s in weight_table(config):
        whole = {s.path: (s.axes, padded_shape(s.axes, s.shape(config), mesh), dtype)}
        kept = leaves(s, config) if precision == NF4 and is_quantized(s) else whole
        for path, (_, shape, kind) in kept.items():
            flat[path] = jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, specs[path]))
    return nest(flat)


def begin_run(
    output: str,
    command: str,
    config: dict[str, Any],
    source: ModelSource,
    method: Method,
    made_from: Callable[[], Contents],
    trains_adapters: bool = False,
) -> None:
    """Makes the run directory, or finds the same run in it to continue.

    Args:
      source: where training starts; adapters will always need it.
      method: what the run will have done.
      made_from: the content of the rows and models that the settings name; called in process 0 alone.

    Raises:
      UserError: the directory holds something else, a run with other settings, rows or weights, or one that another
        process is at.
    """

    def begin() -> None:
        description: dict[str, Any] = {"command": command, "config": config, "made_from": made_from()}
        if trains_adapters:
            description["base"] = {"model": source.name, **source.content()}
        before = read_settings(source.run).get("origin") if source.run else None
        description |= {
            "method": dataclasses.asdict(method),
            "origin": origin(source.below.name, source.directory, config["input"], before),
            "made_with": made_with(),
        }
        _begin_mirrored(epath.Path(output), description, source, config.get("checkpoints", {}).get("remote"))

    everywhere(begin, "the run directory")


def _begin_mirrored(root: epath.Path, description: dict[str, Any], source: ModelSource, remote: str | None) -> None:
    if remote is None:
        _begin_run(root, description, source)
        return
    path, there = root / "config.json", epath.Path(remote) / "config.json"
    begun = mirror.holds_run(remote)
    if begun:
        check_same_settings(there, description, _MAY_CHANGE)
        if path.exists() and path.read_bytes() != there.read_bytes():
            raise UserError(f"{remote}: the copy of another run than {root}; give another config.checkpoints.remote")
        if not path.exists():
            _check_free(root)
        lock(root)
        mirror.fetch(remote, str(root))
    _begin_run(root, description, source)
    if not begun:
        mirror.push_settings(remote, str(root))


def _check_free(root: epath.Path) -> None:
    # What a start that was killed leaves behind is no reason to refuse.
    if root.exists() and {p.name for p in root.iterdir()} - {"model", "config.json.tmp", NAME}:
        raise UserError(f"{root}: not empty and not a run directory; give another config.output")


def _begin_run(root: epath.Path, description: dict[str, Any], source: ModelSource) -> None:
    path = root / "config.json"
    if path.exists():
        check_same_settings(path, description, _MAY_CHANGE)
        lock(root)
        return
    _check_free(root)
    lock(root)
    if (root / "model").exists():
        shutil.rmtree(root / "model")
    (root / "model").mkdir(parents=True)
    copy_side_files(source.directory, root / "model")
    (root / "model" / "config.json").write_text((epath.Path(source.directory) / "config.json").read_text())
    write_settings(path, description)  # last: a directory without config.json is no run
