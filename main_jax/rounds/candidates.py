"""Candidates: rows of a response and an instruction that may go with it, several rows a response."""

import array
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lm_jax.data.journal import rows_fingerprint
from lm_jax.data.rows import stream_rows
from lm_jax.errors import UserError

COLUMNS = ("id", "response", "instruction")


class Candidates:
    """The rows of `path`, read once to check them; the texts stay on disk.

    Memory: about 40 bytes a candidate. Axes: N candidates, M responses, in the order of their first candidates.

    Args:
      path: rows with `id`, of the response, `response`, and `instruction` (None or blank: there is none).
      cluster: name of a column that says which group a response belongs to; None: all are of one.

    Attributes:
      response_of: [N] int64, the number of each candidate's response.
      first: [M] int64, the first candidate of each response.
      clusters: [N] int64, the number of each candidate's cluster.
      fingerprint: sha256 (hex) over ids, responses and instructions in their order.

    Raises:
      UserError: what `stream_rows` raises; a missing column; a value of the wrong kind; an empty response; rows of one
        id with different responses.
    """

    def __init__(self, path: str, cluster: str | None = None):
        self.path, self._cluster = path, cluster
        self._where = os.path.basename(path.rstrip("/"))
        columns = {name: array.array("Q") for name in ("id", "response", *([cluster] if cluster else ()))}
        digest = hashlib.sha256()
        # Of whole rows, to find what JSON cannot hold before a long run, not after it
        rows_fingerprint(self._scanned(columns, digest), self._where)
        self.fingerprint = digest.hexdigest()
        ids, responses = (np.frombuffer(columns[name], np.uint64) for name in ("id", "response"))
        _, first, found = np.unique(ids, return_index=True, return_inverse=True)
        order = np.argsort(first)
        self.first = first[order]
        self.response_of = np.argsort(order)[found]
        differing = np.flatnonzero(responses != responses[self.first[self.response_of]])
        if differing.size:
            row = int(differing[0])
            raise UserError(
                f"{self.name(row)}: has the id of row {self.first[self.response_of[row]]} but another response; an id "
                "names a response: give each its own"
            )
        self.clusters = np.zeros(len(ids), np.int64)
        if cluster:
            self.clusters = np.unique(np.frombuffer(columns[cluster], np.uint64), return_inverse=True)[1]

    def __len__(self) -> int:
        return len(self.response_of)

    def name(self, number: int) -> str:
        """The candidate's, in errors."""
        return f"{self._where} row {number}"

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows, read anew."""
        return stream_rows(self.path, COLUMNS)

    def _scanned(self, columns: Mapping[str, array.array], digest: Any) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(stream_rows(self.path, (*COLUMNS, *([self._cluster] if self._cluster else ())))):
            if fault := _fault(row, self._cluster):
                raise UserError(f"{self.name(number)}: {fault}")
            for name, values in columns.items():
                values.append(_hash(row[name]))
            digest.update(json.dumps([row[name] for name in COLUMNS]).encode())
            yield row


def response_fault(row: Mapping[str, Any]) -> str | None:
    """What is wrong with `id` or `response` of a row, and the cure; None: nothing."""
    if type(row["id"]) not in (int, str) or row["id"] == "":
        return f"id must be a string or a whole number, got {row['id']!r}; mend it"
    if not isinstance(row["response"], str) or not row["response"].strip():
        return "response must be a text that is not empty; drop the row"
    return None


def _fault(row: Mapping[str, Any], cluster: str | None) -> str | None:
    if fault := response_fault(row):
        return fault
    if not isinstance(row["instruction"], str | None):
        kind = type(row["instruction"]).__name__
        return f"instruction must be a text or null, got {kind}; give each candidate a row of its own"
    if cluster and type(row[cluster]) not in (int, str):
        return (
            f"{cluster} must be a string or a whole number, got {row[cluster]!r}; mend it, or leave config.cluster out"
        )
    return None


def _hash(value: int | str) -> int:
    """64 bits: of a million texts two are alike by chance once in 40 million runs."""
    return int.from_bytes(hashlib.blake2b(str(value).encode("utf-8", "surrogatepass"), digest_size=8).digest())
