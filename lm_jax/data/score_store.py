"""Ragged per-token numbers by row, on disk or in a bucket: cached reference log-probs, token weights.

Layout under `path` (zarr3 arrays, readable by any zarr library):

    store.json              written last and at once: a directory without it is no store
    <digest>/lengths        int32 [rows], tokens a row
    <digest>/<field>        float32 [sum of lengths], the rows one after the other, NaN where nothing is written yet

A row is done when none of its values is NaN. So no flag can disagree with the values, a row that was cut in the middle
by a kill reads as missing, and many processes may write disjoint rows at once: tensorstore replaces a chunk file
atomically, and merges anew when another writer replaced it first. <digest> names key, fields and lengths, so processes
that create the same store at once write the same bytes, and leavings of a killed creation are never picked up.
Every chunk carries a CRC-32C, so a bit that flips on disk is an error and not another weight.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from lm_jax.checkpoints.buckets import check_bucket, is_remote
from lm_jax.errors import UserError

_META = "store.json"
_META_TYPES = {"key": dict, "fields": list, "data": str, "lengths_sha256": str}
_FORMAT = 1
_CHUNK = 1 << 16  # values a chunk file: few files for long data, yet cheap to rewrite for a batch of scattered rows
_SCAN = 1 << 22  # values looked at together by missing(): 16 MiB
_CHECKSUM = "crc32c"  # stores of before there was one are read as they are
_DRIVERS = {"gs": "gcs", "s3": "s3"}
_RETRIES = 6  # of a request that got no answer: about a minute
_CACHE_BYTES = 64 << 20  # chunks kept decoded, so that scattered rows of one chunk decode it once; always revalidated


class ScoreStore:
    """Float32 values per token, for several fields, by 0-based row number.

    Attributes:
      path: where it lies; a local directory, gs://bucket/directory or s3://bucket/directory.
      key: the fingerprint given at creation.
      fields: names of the values.
      lengths: int64 [rows], tokens a row.
    """

    def __init__(self, path: str, meta: Mapping[str, Any], lengths: np.ndarray, arrays: Mapping[str, ts.TensorStore]):
        """Use `create_or_open` or `open`."""
        self.path = path
        self.key = dict(meta["key"])
        self.fields = tuple(meta["fields"])
        self.lengths = lengths
        self._offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._arrays = dict(arrays)

    @classmethod
    def create_or_open(
        cls, path: str, key: Mapping[str, Any], lengths: Sequence[int] | np.ndarray, fields: Sequence[str]
    ) -> "ScoreStore":
        """The store at `path`, made if there is none. Safe to call from many processes at once.

        Args:
          path: local directory, gs:// or s3:// address.
          key: what the values depend on (data, model, tokenizer, template, length, dtype), JSON-able.
          lengths: [rows] tokens a row, >= 0.
          fields: names of the values, of letters, digits and underscores.

        Raises:
          UserError: the store there was made for another key, other lengths or fields, or cannot be read.
        """
        lengths = np.asarray(lengths, np.int64)
        if lengths.ndim != 1 or (lengths < 0).any():
            raise ValueError(f"lengths must be [rows] of numbers >= 0, got shape {lengths.shape}")
        if not fields or len(set(fields)) < len(fields) or not _are_names(fields):
            raise ValueError(f"fields must be distinct names of letters, digits and underscores, got {list(fields)}")
        meta = {
            "format": _FORMAT,
            "key": json.loads(json.dumps(key, allow_nan=False)),
            "fields": sorted(fields),
            "chunk": _CHUNK,
            "checksum": _CHECKSUM,
            "lengths_sha256": _lengths_digest(lengths),
        }
        if _kvstore(path)["driver"] != "file":
            check_bucket(path)  # tensorstore would try for ever to write where there is none
        with _storage(path):
            found, generation = _read_meta(path)
            _clear_locks(path)
            if found is None:
                digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:16]
                meta["data"] = digest
                _array(path, f"{digest}/lengths", "int32", 0, len(lengths)).write(lengths.astype(np.int32)).result()
                for field in fields:
                    _array(path, f"{digest}/{field}", "float32", "NaN", int(lengths.sum()))
                # Conditional: of two processes that create different stores here at once, one must see the other's
                content = json.dumps(meta, sort_keys=True).encode()
                _root(path).write(_META, content, if_equal=generation).result()
                found, _ = _read_meta(path)
                assert found is not None, path  # it was written just now
            store = cls._attach(path, found)
        store._check_same(meta, lengths)
        return store

    @classmethod
    def open(cls, path: str) -> "ScoreStore":
        """The store at `path` as it was made, for reading or for going on.

        Raises:
          UserError: there is none, or its creation was cut short.
        """
        with _storage(path):
            meta, _ = _read_meta(path)
            if meta is None:
                raise UserError(
                    f"score store {path}: no store there ({_META} is missing); check the path or score first"
                )
            return cls._attach(path, meta)

    @classmethod
    def _attach(cls, path: str, meta: Mapping[str, Any]) -> "ScoreStore":
        lengths = _array(path, f"{meta['data']}/lengths").read().result().astype(np.int64)
        if _lengths_digest(lengths) != meta["lengths_sha256"]:
            raise UserError(f"score store {path}: its lengths are damaged; delete it and score anew")
        return cls(path, meta, lengths, {f: _array(path, f"{meta['data']}/{f}") for f in meta["fields"]})

    def _check_same(self, meta: Mapping[str, Any], lengths: np.ndarray) -> None:
        cure = "delete it or give another path"
        now = meta["key"]
        if differing := [k for k in sorted({*self.key, *now}) if self.key.get(k) != now.get(k)]:
            told = "; ".join(f"{k} was {_short(self.key.get(k))} and is now {_short(now.get(k))}" for k in differing)
            raise UserError(f"score store {self.path} was made for something else: {told}; {cure}")
        if list(self.fields) != meta["fields"]:
            raise UserError(f"score store {self.path} holds {list(self.fields)}, not {meta['fields']}; {cure}")
        if len(self.lengths) != len(lengths):
            raise UserError(f"score store {self.path} has {len(self.lengths)} rows, the data {len(lengths)}; {cure}")
        if (differ := np.flatnonzero(self.lengths != lengths)).size:
            row = differ[0]
            raise UserError(
                f"score store {self.path}: row {row} has {self.lengths[row]} tokens there and {lengths[row]} now "
                f"({differ.size} rows differ); {cure}"
            )

    def write(self, rows: Sequence[int] | np.ndarray, values: Mapping[str, Sequence[np.ndarray]]) -> None:
        """Writes whole rows, durable on return. Many rows a call: every call rewrites each chunk that it touches once.

        Args:
          rows: distinct row numbers, in any order.
          values: for every field, one [lengths[row]] array for each of `rows`.

        Raises:
          UserError: a value is NaN or infinite, or a row has another length than the store's; nothing is written then.
        """
        rows = self._rows(rows)
        if len(np.unique(rows)) < len(rows):
            raise ValueError("a row is written twice in one call")
        if set(values) != set(self.fields):
            raise ValueError(f"the store holds {list(self.fields)}, got {sorted(values)}")
        flat = {field: self._checked(field, rows, arrays) for field, arrays in values.items()}
        # One transaction: rows that share a chunk cost one rewrite of it, not one each
        transaction = ts.Transaction()
        with _storage(self.path):
            for field, arrays in flat.items():
                target = self._arrays[field].with_transaction(transaction)
                for begin, end, run in self._runs(rows):
                    target[begin:end].write(np.concatenate([arrays[i] for i in run])).result()
            transaction.commit_sync()

    def read(self, rows: Sequence[int] | np.ndarray) -> dict[str, list[np.ndarray]]:
        """{field: one float32 [lengths[row]] array for each of `rows`, in their order}.

        Raises:
          UserError: a row is not done.
        """
        rows = self._rows(rows)
        out: dict[str, list[np.ndarray]] = {}
        for field in self.fields:
            reads = [(begin, run, self._arrays[field][begin:end].read()) for begin, end, run in self._runs(rows)]
            found = out[field] = [np.empty(0, np.float32)] * len(rows)
            for begin, run, read in reads:
                with _storage(self.path):
                    values = read.result()
                for i in run:
                    at = self._offsets[rows[i]] - begin
                    found[i] = values[at : at + self.lengths[rows[i]]]
        lacking = [i for i in range(len(rows)) if any(np.isnan(out[field][i]).any() for field in self.fields)]
        if lacking:
            raise UserError(
                f"score store {self.path}: row {rows[lacking[0]]} has no values yet ({len(lacking)} of the {len(rows)} "
                "rows asked for are missing); run the scoring to its end"
            )
        return out

    def missing(self) -> np.ndarray:
        """int64 [n], ascending: the rows that are not done. Reads every value: call it once, not per batch."""
        lacking = np.zeros(len(self.lengths), bool)
        first = 0
        while first < len(self.lengths):
            last = int(np.searchsorted(self._offsets, self._offsets[first] + _SCAN, side="right")) - 1
            last = min(max(last, first + 1), len(self.lengths))
            begin, end = self._offsets[first], self._offsets[last]
            for field in self.fields:
                with _storage(self.path):
                    values = self._arrays[field][begin:end].read().result()
                holes = np.flatnonzero(np.isnan(values)) + begin
                lacking[np.searchsorted(self._offsets, holes, side="right") - 1] = True
            first = last
        return np.flatnonzero(lacking)

    def _rows(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, np.int64).reshape(-1)
        if rows.size and not (0 <= rows.min() and rows.max() < len(self.lengths)):
            raise ValueError(f"rows must lie in [0, {len(self.lengths)}), got {rows.min()} to {rows.max()}")
        return rows

    def _runs(self, rows: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """(first value, end value, indices into `rows`) for each stretch of neighbouring rows, sorted."""
        order = np.argsort(rows, kind="stable")
        for run in np.split(order, np.flatnonzero(np.diff(rows[order]) > 1) + 1):
            if run.size:
                yield int(self._offsets[rows[run[0]]]), int(self._offsets[rows[run[-1]] + 1]), run

    def _checked(self, field: str, rows: np.ndarray, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        if len(arrays) != len(rows):
            raise ValueError(f"{field}: {len(arrays)} arrays for {len(rows)} rows")
        checked = [np.asarray(a, np.float32) for a in arrays]
        for row, values in zip(rows, checked, strict=True):
            if values.shape != (self.lengths[row],):
                raise UserError(
                    f"score store {self.path}: row {row}: {field} has shape {values.shape} but the row has "
                    f"{self.lengths[row]} tokens; score it with the tokenizer that the store was made with"
                )
            if not (finite := np.isfinite(values)).all():
                at = int(np.argmin(finite))
                raise UserError(
                    f"score store {self.path}: row {row}: {field} is {values[at]} at token {at}; look at the row, or "
                    "compute in float32 if the model overflows"
                )
        return checked


def _are_names(fields: Sequence[str]) -> bool:
    return all(re.fullmatch(r"\w+", f, re.ASCII) for f in fields)


def _lengths_digest(lengths: np.ndarray) -> str:
    return hashlib.sha256(lengths.astype("<i8").tobytes()).hexdigest()


def _kvstore(path: str, inner: str = "") -> dict[str, Any]:
    """What tensorstore calls the place `path/inner`."""
    if not is_remote(path):
        return {"driver": "file", "path": f"{os.path.abspath(os.path.expanduser(path))}/{inner}"}
    scheme, _, rest = path.partition("://")
    bucket, _, prefix = rest.partition("/")
    if scheme not in _DRIVERS or not bucket:
        raise UserError(f"score store {path}: give a local directory, gs://bucket/directory or s3://bucket/directory")
    spec = {"driver": _DRIVERS[scheme], "bucket": bucket, "path": f"{prefix.rstrip('/')}/{inner}".lstrip("/")}
    return spec | _s3_settings() if scheme == "s3" else spec


def _s3_settings() -> dict[str, Any]:
    """What other libraries read in the environment by themselves."""
    env = os.environ
    found = {
        "endpoint": env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL"),
        "aws_region": env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION"),
        # Else it complains of each file under ~/.aws that is not there
        "aws_credentials": {"type": "environment"} if env.get("AWS_ACCESS_KEY_ID") else None,
    }
    # 32 times by default, for many minutes
    return {k: v for k, v in found.items() if v} | {"s3_request_retries": {"max_retries": _RETRIES}}


def _clear_locks(path: str) -> None:
    """Removes what killed writers left, if nobody holds it.

    tensorstore writes a chunk into its lock file and renames that. One that is there already it neither refuses nor
    cuts, so a shorter chunk would keep the tail of what was killed, and could not be read.
    """
    if is_remote(path):
        return
    for lock in Path(path).expanduser().rglob("*.__lock"):
        with contextlib.suppress(OSError), lock.open("r+b") as file:  # OSError: held, or gone meanwhile
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.unlink()


def _root(path: str) -> ts.KvStore:
    return ts.KvStore.open(_kvstore(path)).result()


@contextlib.contextmanager
def _storage(path: str) -> Iterator[None]:
    """Names the store in what the storage refuses: no access, a full disk, a damaged file."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        # Behind its message tensorstore repeats the whole request
        said = str(error).splitlines()[0].split(" [tensorstore_spec")[0].split(" [source locations")[0]
        raise UserError(
            f"score store {path}: {said}; check the path, its access and its free space, or delete a damaged store and "
            "score anew"
        ) from error


def _read_meta(path: str) -> tuple[dict[str, Any] | None, bytes]:
    """store.json (None: there is none), and its generation, for a write that must not replace a newer one."""
    result = _root(path).read(_META).result()
    if result.state == "missing":
        return None, result.stamp.generation
    try:
        meta = json.loads(result.value)
        known = meta["format"] == _FORMAT and all(type(meta[name]) is kind for name, kind in _META_TYPES.items())
        # Both become names of directories
        known = known and re.fullmatch("[0-9a-f]{16}", meta["data"]) and _are_names(meta["fields"])
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise UserError(f"score store {path}: {_META} is not of a score store of this version; give another path")
    return meta, result.stamp.generation


def _array(path: str, inner: str, dtype: str | None = None, fill: Any = None, size: int = 0) -> ts.TensorStore:
    """Opens the array `inner`; makes it, or accepts one just like it, when a dtype is given."""
    spec: dict[str, Any] = {
        "driver": "zarr3",
        "kvstore": _kvstore(path, inner + "/"),
        "context": {"cache_pool": {"total_bytes_limit": _CACHE_BYTES}},
    }
    if dtype is not None:
        spec["metadata"] = {
            "shape": [size],
            "data_type": dtype,
            "fill_value": fill,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [_CHUNK]}},
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "zstd", "configuration": {"level": 1}},
                {"name": _CHECKSUM},
            ],
        }
    return ts.open(spec, open=True, create=dtype is not None).result()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
