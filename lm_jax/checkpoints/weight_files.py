"""The safetensors files of a Hugging Face directory: found, opened and checked, never anything that runs code.

The library's reader checks lengths, offsets, shapes and overlaps. The format has no checksum: a flipped bit in a number
is seen only where it makes a NaN or an infinity.
"""

import json
import mmap
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from lm_jax.errors import UserError
from lm_jax.strict_json import no_doubled_keys, read_json_object

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
# As safetensors calls them; others are not read
STORED_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}


class Tensor(Protocol):
    """One tensor in a file: its dtype as safetensors calls it, its shape, its bytes, and what is made of them."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def data(self) -> np.ndarray:
        """[bytes] uint8, as they are stored."""

    @property
    def array(self) -> np.ndarray: ...


class StoredTensor(NamedTuple):
    """One tensor in a mapped file: its dtype as safetensors calls it, its shape and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray

    @property
    def array(self) -> np.ndarray:
        """The tensor, read-only; nothing is read from the file before it is looked at."""
        return self.data.view(STORED_DTYPES[self.dtype]).reshape(self.shape)


class Checkpoint(NamedTuple):
    """The weight files of a directory: tensors by name, and the maps that they lie in."""

    tensors: Mapping[str, Tensor]
    maps: Sequence[mmap.mmap]

    def forget(self) -> None:
        """What was looked at counts as this process's memory no longer; looked at again, it is read again."""
        for mapped in self.maps:
            mapped.madvise(mmap.MADV_DONTNEED)


def open_checkpoint(model_dir: Path) -> Checkpoint:
    """Maps every weight file of a directory, or one file.

    Raises:
      UserError: no weights, pickles only, a file that is missing, corrupt or outside the directory, a tensor that
        stands twice, in one file or in two.
    """
    tensors: dict[str, Tensor] = {}
    maps, doubled = [], []
    for file in _weight_files(model_dir) if model_dir.is_dir() else [model_dir]:
        found, mapped = _map(file)
        maps.append(mapped)
        doubled += [name for name in found if name in tensors]
        tensors |= found
    if doubled:
        raise UserError(f"{model_dir}: {listed(doubled)} in more than one weight file; remove the stale file")
    return Checkpoint(tensors, maps)


def _weight_files(model_dir: Path) -> list[Path]:
    single, index = model_dir / SINGLE_FILE, model_dir / INDEX_FILE
    if single.exists() and index.exists():
        raise UserError(f"{model_dir}: has both {SINGLE_FILE} and {INDEX_FILE}; remove the stale one")
    if single.exists():
        return [single]
    if index.exists():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: has no weight_map; download it again")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name or "\\" in name or not name.isprintable() or not name.endswith(".safetensors"):
                raise UserError(f"{index}: weight_map names {name!r}, no safetensors file beside it; correct the index")
        return [model_dir / name for name in names]
    if any(model_dir.glob("*.safetensors")):
        raise UserError(f"{model_dir}: neither {SINGLE_FILE} nor {INDEX_FILE} among its safetensors; download it again")
    if found := sorted(path.name for path in model_dir.glob("*.gguf")):
        raise UserError(f"{model_dir}: has GGUF files only; give one of them as the model: {listed(found)}")
    if any(model_dir.glob("*.bin")) or any(model_dir.glob("*.pt")) or any(model_dir.glob("*.pth")):
        raise UserError(
            f"{model_dir}: has PyTorch pickles only, which are never read; convert them to safetensors "
            "(in transformers: from_pretrained, then save_pretrained)"
        )
    raise UserError(f"{model_dir}: has no {SINGLE_FILE} and no {INDEX_FILE}; give a directory in Hugging Face format")


def _map(file: Path) -> tuple[dict[str, StoredTensor], mmap.mmap]:
    """The tensors of one file by name, and the file, read-only."""
    try:
        with safe_open(file, framework="np"):  # checks all that it claims of itself
            pass
    except FileNotFoundError:
        raise UserError(f"{file}: this weight file is missing; download the checkpoint again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: truncated or no safetensors file ({error}); download it again (with git-lfs if it was cloned)"
        ) from error
    with file.open("rb") as source:
        (size,) = struct.unpack("<Q", source.read(8))
        try:
            # Of a name that stands twice the library keeps the last without a word; another reader may keep the first
            header = json.loads(source.read(size), object_pairs_hook=no_doubled_keys)
        except ValueError as error:
            raise UserError(f"{file}: its header is faulty ({error}); download it again") from error
        mapped = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    whole = np.frombuffer(mapped, np.uint8)[8 + size :]
    found = {
        name: StoredTensor(entry["dtype"], tuple(entry["shape"]), whole[slice(*entry["data_offsets"])])
        for name, entry in entries.items()
    }
    return found, mapped


def check_finite(x: np.ndarray, name: str, model_dir: str | Path) -> None:
    """Raises UserError where an array [...], float32, bfloat16 or float16, holds NaN or infinity.

    By bit pattern, which beyond fp32 is ten times faster than np.isfinite: a float that is none has all bits of its
    exponent set, so it is no smaller than infinity as a signed integer or, if negative, as an unsigned one.
    """
    if not x.size:
        return
    signed, unsigned = np.dtype(f"i{x.itemsize}"), np.dtype(f"u{x.itemsize}")
    infinities = np.array([np.inf, -np.inf], x.dtype)
    if x.view(signed).max() >= infinities.view(signed)[0] or x.view(unsigned).max() >= infinities.view(unsigned)[1]:
        raise UserError(
            f"{model_dir}: {name} has NaN or infinity (as {x.dtype}); the file is damaged, or the model diverged or "
            "overflows in this dtype: download it again, or use another checkpoint or config.dtype"
        )


def listed(names: Sequence[str], shown: int = 4) -> str:
    """The first names, and how many there are, for an error."""
    more = f", ... ({len(names)} tensors)" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
