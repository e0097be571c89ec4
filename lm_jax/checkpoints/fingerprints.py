"""What tells a model from another: what it computes and the content of its weights, never their place, name or time."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import xxhash

from lm_jax.checkpoints.weight_files import Checkpoint
from lm_jax.config import ModelConfig
from lm_jax.distributed.processes import check_alike

WHOLE = 1 << 32  # bytes of a model that are read, in a second or two; more would be slow where a process loads a share
_BLOCK = 1 << 16  # bytes read at a place
_THREADS = 4


def weights_fingerprint(checkpoint: Checkpoint, whole: int = WHOLE) -> str:
    """xxh3-128 (hex) over tensors: each one's name, dtype, shape and bytes.

    How they are cut into files does not count. Of up to `whole` bytes in all, every one does. Of a larger model it is
    one block in k of each tensor, spread evenly, with its first and last one, so that k times fewer are read: what
    changes a whole tensor, as training, merging and rounding do, never escapes; of edits of n bytes in a row about the
    share 1 / k + n / (k * 64 KiB) is seen. Not cryptographic: it tells versions apart, and is ten times as fast.
    """
    tensors = checkpoint.tensors
    stride = max(1, -(-sum(tensor.data.nbytes for tensor in tensors.values()) // whole)) * _BLOCK

    def one(name: str) -> bytes:
        tensor = tensors[name]
        data, size = tensor.data.data, tensor.data.nbytes
        digest = xxhash.xxh3_128(f"{name} {tensor.dtype} {tensor.shape}".encode())
        for start in (*range(0, size, stride), max(0, size - _BLOCK)):
            digest.update(data[start : start + _BLOCK])
        return digest.digest()

    digest = xxhash.xxh3_128()
    with ThreadPoolExecutor(_THREADS) as pool:
        for part in pool.map(one, sorted(tensors)):
            digest.update(part)
            checkpoint.forget()
    return digest.hexdigest()


def check_copies(checkpoint: Checkpoint, name: str | Path) -> None:
    """Raises UserError where the processes of a run hold different models there; the ends of each tensor are read."""
    if jax.process_count() > 1:
        digest = bytes.fromhex(weights_fingerprint(checkpoint, whole=1))
        check_alike(digest, f"weights in {name}", "give every process the same model")


def config_told(config: ModelConfig) -> str:
    """All that a model's forward pass depends on besides its weights.

    Fields of their default value are left out, so that one which a later version adds changes no fingerprint.
    """

    def told(value: Any) -> Any:
        if not dataclasses.is_dataclass(value):
            return value
        fields = {field.name: field.default for field in dataclasses.fields(value)}
        return {n: told(getattr(value, n)) for n, default in fields.items() if getattr(value, n) != default}

    return repr(told(config))
