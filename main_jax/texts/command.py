"""`launch.main_prepare`: documents -> responses without instructions, for MAIN (arXiv 2504.12913) to write them for."""

import array
import collections
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lm_jax.data.columns import RowKeys
from lm_jax.data.faults import Faults, fault_rows
from lm_jax.data.layouts import columns_of
from lm_jax.data.rows import stream_rows, write_jsonl
from lm_jax.data.similarity import near_duplicates
from lm_jax.distributed.processes import everywhere, worked
from lm_jax.errors import UserError
from main_jax.texts.segments import LineFault, SegmentConfig, SegmentFault, cut, line_key

_FURNITURE_WORDS = 30  # a longer line that stands twice belongs to a copied text, which is for the near-duplicates


@dataclasses.dataclass(frozen=True)
class PrepareConfig(RowKeys):
    """`configs/main_prepare.py` says what each key is for."""

    input: str
    output: str
    column: str
    near_duplicate: float
    max_repeats: int
    segments: SegmentConfig

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.near_duplicate <= 1:
            raise UserError(f"config.near_duplicate={self.near_duplicate}: must lie between 0 (off) and 1")
        if self.max_repeats < 1:
            raise UserError(f"config.max_repeats={self.max_repeats}: must be at least 1")
        if not self.output.endswith(".jsonl") or os.path.isdir(self.output):
            raise UserError(f"{self.output}: what is written is JSON Lines; give config.output a name ending in .jsonl")


def prepare(config: PrepareConfig) -> None:
    """Cuts documents into segments and writes the good ones to `config.output` (JSONL) as `id`, `response`, `document`.

    Beside it: `.dropped.jsonl`, the segments that were left out and why; `.counts.json`, the table that is printed. The
    documents are read twice, one after the other; in memory are the kept segments alone.

    Raises:
      UserError: anything the user can mend, naming file or row; no segment is left.
    """
    everywhere(lambda: _prepare(config), "the end of the preparation")


def _prepare(config: PrepareConfig) -> None:
    sorting = _Sorting(config)
    dropped = f"{config.output}.dropped.jsonl"
    faults = sorting.faults
    write_jsonl(dropped, itertools.chain(fault_rows([faults]), sorting.dropped()))
    faults.say(dropped)
    counts = sorting.counts() | {"output": config.output}
    write_jsonl(f"{config.output}.counts.json", [counts])
    print(table(counts), flush=True)
    if not sorting.kept:
        raise UserError(
            f"{config.input}: no segment is left of {counts['segments']}; {dropped} says why: give other documents, or "
            "loosen config.segments"
        )
    rows = ({"id": id, "response": text, "document": name} for id, name, text in sorting.kept)
    write_jsonl(config.output, rows)


class _Sorting:
    """Segments of all documents, kept or dropped. `kept`, (id, document, text) each, is there once `dropped` ended."""

    def __init__(self, config: PrepareConfig):
        self._config = config
        self.faults = Faults(os.path.basename(config.input.rstrip("/")), config.max_dropped_share)
        self._repeated = _repeated_lines(config, self.faults)
        self._documents = 0
        self._lines: collections.Counter[str] = collections.Counter()
        self._segments: collections.Counter[str | None] = collections.Counter()  # None: kept
        self.kept: list[tuple[str, str | int, str]] = []

    def dropped(self) -> Iterator[dict[str, Any]]:
        """What is left out, as it is found; near-duplicates, which can only be seen among all, last."""
        repeated = self._repeated
        for name, text in _documents(self._config, self.faults):
            worked()
            self._documents += 1
            pieces = cut(text, self._config.segments, lambda key: _hash(key) in repeated, self._lines)
            for number, piece in enumerate(pieces):
                self._segments[piece.fault] += 1
                if piece.fault is None:
                    self.kept.append((f"{name}/{number}", name, piece.text))
                else:
                    yield _dropped(f"{name}/{number}", name, piece.fault, piece.text)
        if self._config.near_duplicate:
            earlier = near_duplicates([text for _, _, text in self.kept], self._config.near_duplicate)
            for row, first in zip(self.kept, earlier, strict=True):
                if first is not None:
                    yield _dropped(*row[:2], SegmentFault.NEAR_DUPLICATE, row[2]) | {"of": self.kept[first][0]}
            self.kept = [row for row, first in zip(self.kept, earlier, strict=True) if first is None]

    def counts(self) -> dict[str, Any]:
        """Lines and segments by what became of them, ready for JSON."""
        repeats = {SegmentFault.NEAR_DUPLICATE: self._segments[None] - len(self.kept)}
        segments = collections.Counter(
            {fault: n for fault, n in self._segments.items() if fault}
        ) + collections.Counter(repeats)
        return {
            "documents": self._documents,
            "documents_used": len({name for _, name, _ in self.kept}),
            "lines_dropped": {str(fault): self._lines[fault] for fault in LineFault if self._lines[fault]},
            "segments": len(self.kept) + segments.total(),
            "segments_dropped": {str(fault): segments[fault] for fault in SegmentFault if segments[fault]},
            "kept": len(self.kept),
        }


def table(counts: dict[str, Any]) -> str:
    """The counts as lines of text."""
    parts = []
    for what in ("lines", "segments"):
        rows = sorted(counts[f"{what}_dropped"].items(), key=lambda row: (-row[1], row[0]))
        width = max((len(reason) for reason, _ in rows), default=0)
        parts += [f"{what} dropped", *(f"  {reason:<{width}}  {count:>7}" for reason, count in rows or [("none", 0)])]
    kept = f"kept {counts['kept']} of {counts['segments']} segments"
    return "\n".join([*parts, f"{kept}, from {counts['documents_used']} of {counts['documents']} documents"])


def _documents(config: PrepareConfig, faults: Faults) -> Iterator[tuple[str | int, str]]:
    """(name, text) of every document: a row, named by its `id` or number; or a .txt file, named by its own name.

    Faulty rows are noted and left out; once all were read too many of them raise.
    """
    path = Path(config.input)
    if path.suffix == ".txt" or (path.is_dir() and any(path.glob("*.txt"))):
        for file in sorted(path.glob("*.txt")) if path.is_dir() else [path]:
            try:
                yield file.stem, file.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as error:
                raise UserError(f"{file}: not UTF-8 (byte {error.start}); convert the file to UTF-8") from error
        return
    seen: set[int] = set()
    number = -1
    for number, row in enumerate(stream_rows(config.input, renamed=config.columns)):
        where = f"{faults.where} row {number}"
        name, text = row.get("id"), row.get(config.column)
        name = number if name is None else name
        with faults.of(number):
            if type(name) not in (int, str) or name == "":
                raise UserError(
                    f"{where}: id must be a string or a whole number, got {name!r}; mend or drop it"
                )
            if (key := _hash(str(name))) in seen:
                raise UserError(
                    f"{where}: another row has the same id {name!r} (a row without one is called by its number)"
                )
            if text is None:
                raise UserError(f"{where}: column {config.column!r} is missing ({columns_of(row)}); see config.column")
            if not isinstance(text, str):
                raise UserError(f"{where}: {config.column} must be a text, got {type(text).__name__}; drop the row")
            seen.add(key)
        if number not in faults.rows:
            yield name, text
    faults.check(number + 1)


def _repeated_lines(config: PrepareConfig, faults: Faults) -> frozenset[int]:
    """Hashes of short lines that stand in more than `max_repeats` documents."""
    keys = array.array("Q")
    for _, text in _documents(config, faults):
        lines = {line_key(line) for line in text.splitlines()}
        keys.extend(_hash(line) for line in lines if line and len(line.split()) <= _FURNITURE_WORDS)
    found, counts = np.unique(np.frombuffer(keys, np.uint64), return_counts=True)
    return frozenset(found[counts > config.max_repeats].tolist())


def _dropped(id: str, document: str | int, fault: SegmentFault, text: str) -> dict[str, Any]:
    return {"id": id, "reason": str(fault), "document": document, "text": text}


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())
