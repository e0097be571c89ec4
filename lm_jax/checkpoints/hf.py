"""Hugging Face checkpoints <-> sharded parameters, streaming: only safetensors, nothing unknown, nothing missing.

Loading reads for every device only its slice, one stacked tensor at a time. Exporting holds one shard in host memory.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from lm_jax.checkpoints.directories import GGUF, appears_whole, check_output, copy_side_files, write_card
from lm_jax.checkpoints.fingerprints import check_copies
from lm_jax.checkpoints.gguf import open_gguf
from lm_jax.checkpoints.weight_files import (
    INDEX_FILE,
    STORED_DTYPES,
    Checkpoint,
    Tensor,
    check_finite,
    listed,
    open_checkpoint,
)
from lm_jax.checkpoints.weight_names import model_tensors
from lm_jax.config import ModelConfig
from lm_jax.distributed.processes import barrier, everywhere, moving, reached
from lm_jax.errors import UserError
from lm_jax.models.registry import config_from_hf, config_to_hf, weight_table
from lm_jax.models.weights import WeightSpec, flatten, nest
from lm_jax.sharding import padded_shape
from lm_jax.strict_json import dumps, read_json_object

DTYPES = {dtype.name: dtype for dtype in STORED_DTYPES.values()}
_ALIGNED = 64  # bytes
_THREADS = 4  # layers that are read at a time
_STRIP = 64  # bytes of a row that are transposed at a time: a line of the cache


def load_params(
    model_dir: str | Path,
    config: ModelConfig,
    shardings: Mapping[str, Any] | None,
    dtype: str = "float32",
    replace: Callable[[WeightSpec, jax.Array], Mapping[str, jax.Array]] | None = None,
) -> dict[str, Any]:
    """Reads the parameters of a Hugging Face directory or of a GGUF file, each device only its slice.

    Args:
      model_dir: holds model.safetensors, or an index and its shards, in fp32, bf16 or fp16; or the GGUF file.
      config: of that model; gives every name and shape.
      shardings: nested dict of `jax.sharding.Sharding` shaped like the parameters; None: the default device.
      dtype: of the result: float32 | bfloat16 | float16.
      replace: given each parameter as it comes, in fp32 then, returns by path what is kept in its place.

    Returns:
      The parameters, a nested dict. Host memory while loading: the local slices of one stacked tensor here, what holds
      them in the mapped files, and, of another dtype, four layers more.

    Raises:
      UserError: a file that is missing, corrupt or outside the directory; names that are unknown, missing, doubled or
        mis-shaped; a dtype that is no float; NaN or infinity; a tied output embedding that differs from the input one.
    """
    table = weight_table(config)
    flat = None if shardings is None else flatten(shardings)
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    checkpoint = open_weights(Path(model_dir))
    check_copies(checkpoint, model_dir)
    tensors = model_tensors(model_dir, checkpoint.tensors, table, config)
    checkpoint.forget()
    params: dict[str, Any] = {}
    for spec in table:
        sharding = default if flat is None else flat[spec.path]
        x = _load(spec, tensors, config, sharding, dtype if replace is None else "float32", model_dir)
        checkpoint.forget()
        params |= {spec.path: x} if replace is None else replace(spec, x)
    return nest(params)


def open_weights(path: Path) -> Checkpoint:
    """The tensors of a Hugging Face directory, of one of its files or of a GGUF file; raises as their readers do."""
    return open_gguf(path) if path.suffix == GGUF else open_checkpoint(path)


def _load(
    spec: WeightSpec,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    sharding: jax.sharding.Sharding,
    dtype: str,
    model_dir: str | Path,
) -> jax.Array:
    names, shape = spec.hf_names(config), padded_shape(spec.axes, spec.shape(config), sharding)

    def ranges(index: Any) -> tuple[range, ...]:  # of slices
        return tuple(range(size)[s] for size, s in zip(shape, index, strict=True))

    places = set(map(ranges, sharding.addressable_devices_indices_map(shape).values()))
    slices = {place: _aligned([len(r) for r in place], DTYPES[dtype]) for place in places}  # shared by equal devices

    def fill(layer: int) -> None:  # read once, for all devices
        whole = spec.to_ours(tensors[names[layer]].array, config)
        for place, out in slices.items():
            cut: tuple[Any, ...] = (out[layer - place[0].start], *place[1:]) if spec.stacked else (out, *place)
            target, *rest = cut
            part = whole[tuple(slice(r.start, r.stop) for r in rest)]
            if part.shape != target.shape:  # the rest is padding
                target[...] = 0
                target = target[: len(part)]
            _copy(target, part)
            check_finite(target, names[layer], model_dir)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(fill, range(len(names))))
    # Waiting keeps the next tensor's host memory from piling up on this one's.
    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, lambda index: slices[ranges(index)]))


def _aligned(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An empty array that begins where XLA wants one to: on a CPU JAX takes it as it is, for all devices, uncopied."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + _ALIGNED, np.uint8)
    start = -buffer.ctypes.data % _ALIGNED
    return buffer[start : start + size].view(dtype).reshape(shape)


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source, which may be transposed: in strips, which caches hold, several times faster.

    Of another dtype it is turned first: numpy casts what is contiguous many times faster.
    """
    last, minor = source.ndim - 1, int(np.argmin(source.strides))
    if minor == last:
        target[...] = source
        return
    if target.dtype != source.dtype:
        turned = np.empty(source.shape, source.dtype)
        _copy(turned, source)
        target[...] = turned
        return
    whole = [slice(None)]
    places: list[Sequence[Any]] = [whole if axis == minor else range(n) for axis, n in enumerate(source.shape[:-1])]
    width = _STRIP // source.itemsize
    strips = [slice(start, start + width) for start in range(0, source.shape[last], width)]
    for place in itertools.product(*places, strips):
        target[place] = source[place]


def export_hf(
    params: Mapping[str, Any],
    config: ModelConfig,
    output_dir: str | Path,
    source_dir: str | Path | None,
    dtype: str,
    max_shard_bytes: int = 5_000_000_000,
    card: str | None = None,
) -> None:
    """Writes a directory that transformers loads. All processes call it; process 0 writes.

    Args:
      params: the parameters, sharded in any way.
      config: of the parameters.
      output_dir: local, gs:// or s3://, absent or empty. It appears whole or not at all.
      source_dir: Hugging Face directory whose config.json is kept and whose tokenizer, chat template and generation
        config are copied; None: weights and config.json only.
      dtype: of the tensors: float32 | bfloat16 | float16.
      max_shard_bytes: bytes of tensors a file, and about the host memory used; a larger tensor has a file of its own.
      card: text of its README.md.

    Raises:
      UserError: the output exists and is not empty; `source_dir` describes another model; `params` do not fit `config`;
        a value that overflows in `dtype`.
    """
    writer = jax.process_index() == 0
    if dtype not in DTYPES:
        raise UserError(f"export dtype {dtype!r}: not supported; use {', '.join(DTYPES)}")
    table, flat = weight_table(config), flatten(params)
    _check_params(flat, table, config)
    everywhere(lambda: check_output(output_dir), "the check of the output")
    hf_config = {**_hf_config(config, source_dir), "dtype": dtype, "torch_dtype": dtype}

    origins = {name: (spec, i) for spec in table for i, name in enumerate(spec.hf_names(config))}
    sizes = {name: int(np.prod(s.hf_shape(config))) * DTYPES[dtype].itemsize for name, (s, _) in origins.items()}
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    with appears_whole(output_dir) if writer else contextlib.nullcontext() as partial:
        for file, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                spec, layer = origins[name]
                host = _gather(flat[spec.path], layer if spec.stacked else None)
                if writer:
                    words = host[: spec.hf_shape(config)[0]] if spec.axes[0] == "vocab" else host
                    shard[name] = _cast(spec.to_hf(words, config), dtype, name)
            if partial is not None:
                with moving(str(output_dir)):
                    save_file(shard, partial / file, metadata={"format": "pt"})
        if partial is not None:
            if split.is_sharded:
                index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": split.tensor_to_filename}
                _write_json(partial / INDEX_FILE, index)
            copy_side_files(source_dir, partial)
            write_card(card, partial)
            _write_json(partial / "config.json", hf_config)
    barrier("the end of the export")


def _check_params(flat: Mapping[str, Any], table: Sequence[WeightSpec], config: ModelConfig) -> None:
    expected = {s.path: padded_shape(s.axes, s.shape(config), _sharding(flat.get(s.path))) for s in table}
    found = {path: tuple(x.shape) for path, x in flat.items()}
    if wrong := sorted(p for p in expected.keys() | found.keys() if expected.get(p) != found.get(p)):
        path = wrong[0]
        raise UserError(
            f"parameters do not fit the model config: {listed(wrong)}; "
            f"{path} has shape {found.get(path)}, expected {expected.get(path)}"
        )


def _sharding(x: Any) -> Any:
    return getattr(x, "sharding", None)


def _hf_config(config: ModelConfig, source_dir: str | Path | None) -> dict[str, Any]:
    ours = config_to_hf(config)
    path = Path(source_dir) / "config.json" if source_dir is not None else None
    if path is None or not path.exists():
        return ours
    source = read_json_object(path)
    if config_from_hf(source) != config:
        raise UserError(f"{path}: describes another model than the one to export; give the directory it came from")
    rope = {key: ours[key] for key in ("rope_theta", "rope_scaling", "rope_parameters")}
    return {**source, **rope, "architectures": ours["architectures"]}


def _gather(x: jax.Array, layer: int | None) -> np.ndarray:
    """The whole array, or one layer of it, in this host's memory."""
    if layer is not None:
        x = _layer(x, layer)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        reached("the gathering of a tensor")
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


@jax.jit
def _layer(x: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)


def _cast(x: np.ndarray, dtype: str, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # reported below, with its name
        cast = np.ascontiguousarray(x.astype(DTYPES[dtype], copy=False))
    if dtype == "float16" and np.isinf(cast).any() and not np.isinf(x.astype(np.float32)).any():
        raise UserError(f"{name}: values overflow in float16; export as bfloat16 or float32")
    return cast


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
