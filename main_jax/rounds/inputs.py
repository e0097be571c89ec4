"""What rounds begin with (MAIN, arXiv 2504.12913): seed pairs, and responses without instructions."""

import dataclasses
import os
from typing import Any

from lm_jax.data.messages import Text
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


def read_seeds(path: str) -> list[SeedPair]:
    """Reads seed pairs in any layout of `supervised_rows`, each of one instruction and one response.

    Raises:
      UserError: what `supervised_rows` raises; a conversation of several turns or with a system message, since the
        rounds set their own; a blank instruction or response; a row that is not seed; no row left.
    """
    where = os.path.basename(path.rstrip("/"))
    pairs = []
    for row in supervised_rows(read_rows(path), where).rows:
        at = f"{where} row {row.row}"
        if row.source != SEED:
            raise UserError(f"{at}: source is {row.source!r}; the rounds take real pairs alone: drop the row")
        instruction, response = _single(row.prompt, "user", at), _single(row.response, "assistant", at)
        for name, text in (("instruction", instruction), ("response", response)):
            if not text.strip():
                raise UserError(f"{at}: its {name} is empty; drop the row")
        pairs.append(SeedPair(row.row, instruction, response, row.weight))
    if not pairs:
        raise UserError(f"{path}: no seed pairs left, all weigh 0; give pairs that weigh something")
    return pairs


def read_unlabelled(path: str) -> list[dict[str, Any]]:
    """Reads rows with `id` and `response`, as `launch.main_prepare` writes them; other columns go along.

    Raises:
      UserError: what `read_rows` raises; an id twice or of a wrong kind; an empty response.
    """
    where = os.path.basename(path.rstrip("/"))
    rows = read_rows(path, ("id", "response"))
    first: dict[str, int] = {}
    for number, row in enumerate(rows):
        if fault := response_fault(row):
            raise UserError(f"{where} row {number}: {fault}")
        before = first.setdefault(str(row["id"]), number)
        if before != number:
            raise UserError(
                f"{where} row {number}: has the same id {row['id']!r} as row {before}; an id names a response and "
                "decides its random draws: give each its own"
            )
    return rows


def given_rows(seeds: str, unlabelled: str) -> dict[str, list[dict[str, Any]]]:
    """What is used of both files, by the setting that names it; columns that go along come in one order."""
    return {
        "seeds": [dataclasses.asdict(pair) for pair in read_seeds(seeds)],
        "unlabelled": [dict(sorted(row.items())) for row in read_unlabelled(unlabelled)],
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
