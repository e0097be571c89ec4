"""What rounds begin with (MAIN, arXiv 2504.12913): seed pairs, and responses without instructions."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from lm_jax.data.columns import Renamed
from lm_jax.data.faults import Faults, RowIds
from lm_jax.data.messages import TEMPLATE_KWARGS, TOOLS, Text, read_template_kwargs, split_arguments
from lm_jax.data.rows import read_rows
from lm_jax.data.supervised import SEED, supervised_rows
from lm_jax.errors import UserError
from main_jax.rounds.candidates import response_fault


@dataclasses.dataclass(frozen=True)
class SeedPair:
    """An instruction with its response; both are real texts."""

    row: int  # 0-based position in the file
    instruction: str
    response: str
    weight: float  # > 0
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the chat template


def read_seeds(path: str, columns: str = "", max_dropped_share: float | None = None) -> tuple[list[SeedPair], Faults]:
    """Reads seed pairs in any layout of `supervised_rows`, each of one instruction and one response.

    Args:
      columns: as `columns.Renamed` has them.
      max_dropped_share: see `Faults`.

    Returns:
      The pairs, and the faults of the rows that are left out: those of `supervised_rows`; a conversation of several
      turns or with a system message, since the rounds set their own; a blank instruction or response; a row that is not
      seed.

    Raises:
      UserError: too many faulty rows; no row left.
    """
    where = os.path.basename(path.rstrip("/"))
    rows, faults = read_rows(path, renamed=columns), Faults(where, max_dropped_share)
    pairs = []
    for row in supervised_rows(rows, where, faults=faults, named=tuple(Renamed(columns).names)).rows:
        at = f"{where} row {row.row}"
        with faults.of(row.row):
            if row.source != SEED:
                raise UserError(f"{at}: source is {row.source!r}; the rounds take real pairs alone: drop the row")
            kwargs, prompt = ({}, row.prompt) if isinstance(row.prompt, str) else split_arguments(row.prompt)
            if TOOLS in kwargs:
                raise UserError(f"{at}: has tools, which no instruction of the models' own can use; drop the row")
            instruction, response = _single(prompt, "user", at), _single(row.response, "assistant", at)
            for name, text in (("instruction", instruction), ("response", response)):
                if not text.strip():
                    raise UserError(f"{at}: its {name} is empty; drop the row")
            pairs.append(SeedPair(row.row, instruction, response, row.weight, kwargs))
    faults.check(len(rows))
    if not pairs:
        raise UserError(f"{path}: no seed pairs left, all weigh 0; give pairs that weigh something")
    return pairs, faults


def read_unlabelled(
    path: str, columns: str = "", max_dropped_share: float | None = None
) -> tuple[list[dict[str, Any]], Faults]:
    """Reads rows with `id` and `response`, as `launch.main_prepare` writes them; other columns go along.

    Args:
      columns: as `columns.Renamed` has them.
      max_dropped_share: see `Faults`.

    Returns:
      The rows, and the faults of those that are left out: an id missing, twice or of a wrong kind; no response.

    Raises:
      UserError: what `read_rows` raises; too many faulty rows.
    """
    where = os.path.basename(path.rstrip("/"))
    rows, faults = read_rows(path, renamed=columns), Faults(where, max_dropped_share)
    ids = RowIds(faults)
    for number, row in enumerate(rows):
        if fault := response_fault(row):
            faults.add(number, f"{where} row {number}: {fault}")
        else:
            ids.of(number, row["id"])
            with faults.of(number):
                read_template_kwargs(row.get(TEMPLATE_KWARGS), f"{where} row {number}: {TEMPLATE_KWARGS}")
    faults.check(len(rows))
    return [row for number, row in enumerate(rows) if number not in faults.rows], faults


def given_rows(seeds: Sequence[Any], unlabelled: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What is used of both files, by the setting that names it; columns that go along come in one order."""
    return {
        "seeds": [dataclasses.asdict(pair) for pair in seeds],
        "unlabelled": [dict(sorted(row.items())) for row in unlabelled],
    }


def _single(text: Text, role: str, at: str) -> str:
    if isinstance(text, str):
        return text
    if [message["role"] for message in text] != [role]:
        found = ", ".join(message["role"] for message in text)
        raise UserError(
            f"{at}: has messages of {found} where one of {role} should stand; a seed is one instruction and one "
            "response, and the rounds set the system message (config.prompts): cut the row, or drop it"
        )
    return text[0]["content"]
