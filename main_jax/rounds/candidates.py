"""Candidates: rows of a response and an instruction that may go with it, several rows a response."""

import array
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lm_jax.data.faults import Faults
from lm_jax.data.journal import rows_fingerprint
from lm_jax.data.messages import TEMPLATE_KWARGS, read_template_kwargs
from lm_jax.data.rows import stream_rows
from lm_jax.errors import UserError

COLUMNS = ("id", "response", "instruction")


class Candidates:
    """The rows of `path`, read once to check them; the texts stay on disk. Faulty rows are left out.

    Memory: about 40 bytes a candidate. Axes: N candidates, M responses, in the order of their first candidates.

    Args:
      path: rows with `id`, of the response, `response`, and `instruction` (None or blank: there is none).
      cluster: name of a column that says which group a response belongs to; None: all are of one.
      columns: as `columns.Renamed` has them.
      max_dropped_share: see `Faults`.

    Attributes:
      response_of: [N] int64, the number of each candidate's response.
      first: [M] int64, the first candidate of each response.
      clusters: [N] int64, the number of each candidate's cluster.
      fingerprint: sha256 (hex) over ids, responses, instructions and `chat_template_kwargs` in their order.
      faults: a missing column; a value of the wrong kind; an empty response; another response than an earlier row of
        the same id.

    Raises:
      UserError: what `stream_rows` raises; too many faulty rows; none that is not.
    """

    def __init__(
        self, path: str, cluster: str | None = None, columns: str = "", max_dropped_share: float | None = None
    ):
        self.path, self._cluster, self._columns = path, cluster, columns
        self._where = os.path.basename(path.rstrip("/"))
        self.faults = Faults(self._where, max_dropped_share)
        hashes = {name: array.array("Q") for name in ("id", "response", *([cluster] if cluster else ()))}
        digest, numbers = hashlib.sha256(), array.array("Q")
        # Of whole rows, to find what JSON cannot hold before a long run, not after it
        rows_fingerprint(self._scanned(hashes, numbers, digest), self._where)
        self.fingerprint = digest.hexdigest()
        found = {name: np.frombuffer(values, np.uint64) for name, values in hashes.items()}
        self._numbers = np.frombuffer(numbers, np.uint64).astype(np.int64)
        self._find_responses(found["id"])
        differing = found["response"] != found["response"][self.first[self.response_of]]
        for i in np.flatnonzero(differing).tolist():
            first = self._numbers[self.first[self.response_of[i]]]
            self.faults.add(
                int(self._numbers[i]),
                f"{self.name(i)}: has the id of row {first} but another response; an id names a response: give each "
                "its own",
            )
        self.faults.check(self._total)
        if differing.any():
            found = {name: values[~differing] for name, values in found.items()}
            self._numbers = self._numbers[~differing]
            self._find_responses(found["id"])
        if not len(self):
            raise UserError(f"{path}: no candidate left, all rows are faulty")
        self.clusters = np.zeros(len(self), np.int64)
        if cluster:
            self.clusters = np.unique(found[cluster], return_inverse=True)[1]

    def _find_responses(self, ids: np.ndarray) -> None:
        _, first, found = np.unique(ids, return_index=True, return_inverse=True)
        order = np.argsort(first)
        self.first = first[order]
        self.response_of = np.argsort(order)[found]

    def __len__(self) -> int:
        return len(self.response_of)

    def name(self, number: int) -> str:
        """The candidate's, in errors."""
        return f"{self._where} row {self._numbers[number]}"

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows of candidates, read anew."""
        rows = stream_rows(self.path, renamed=self._columns)
        return (row for number, row in enumerate(rows) if number not in self.faults.rows)

    def _scanned(
        self, hashes: Mapping[str, array.array], numbers: array.array, digest: Any
    ) -> Iterator[dict[str, Any]]:
        self._total = 0
        for number, row in enumerate(stream_rows(self.path, renamed=self._columns)):
            self._total += 1
            if fault := _fault(row, self._cluster):
                self.faults.add(number, f"{self._where} row {number}: {fault}")
                continue
            numbers.append(number)
            for name, values in hashes.items():
                values.append(_hash(row[name]))
            kwargs = read_template_kwargs(row.get(TEMPLATE_KWARGS), TEMPLATE_KWARGS)
            digest.update(json.dumps([*(row[name] for name in COLUMNS), *([kwargs] if kwargs else [])]).encode())
            yield row


def response_fault(row: Mapping[str, Any]) -> str | None:
    """What is wrong with `id` or `response` of a row, and the cure; None: nothing."""
    if fault := _missing(row, COLUMNS[:2]):
        return fault
    if type(row["id"]) not in (int, str) or row["id"] == "":
        return f"id must be a string or a whole number, got {row['id']!r}; mend it"
    if not isinstance(row["response"], str) or not row["response"].strip():
        return "response must be a text that is not empty; drop the row"
    return None


def _fault(row: Mapping[str, Any], cluster: str | None) -> str | None:
    if fault := response_fault(row):
        return fault
    if fault := _missing(row, (*COLUMNS[2:], *([cluster] if cluster else []))):
        return fault
    if not isinstance(row["instruction"], str | None):
        kind = type(row["instruction"]).__name__
        return f"instruction must be a text or null, got {kind}; give each candidate a row of its own"
    try:
        read_template_kwargs(row.get(TEMPLATE_KWARGS), TEMPLATE_KWARGS)
    except UserError as error:
        return str(error)
    if cluster and type(row[cluster]) not in (int, str):
        return (
            f"{cluster} must be a string or a whole number, got {row[cluster]!r}; mend it, or leave config.cluster out"
        )
    return None


def _missing(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    missing = next((name for name in names if name not in row), None)
    if missing is None:
        return None
    return (
        f"column {missing!r} is missing; it has {', '.join(sorted(row)) or 'none'}; add it, or name yours: "
        f'--config.columns="{missing}=..."'
    )


def _hash(value: int | str) -> int:
    """64 bits: of a million texts two are alike by chance once in 40 million runs."""
    return int.from_bytes(hashlib.blake2b(str(value).encode("utf-8", "surrogatepass"), digest_size=8).digest())
