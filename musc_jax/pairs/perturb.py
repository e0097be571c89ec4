"""What a perturbed instruction does not ask for (MuSC, arXiv 2502.11541, section 3.2): dropped, substituted, negated.

Negations are texts that only the model can write: rules would cover the commonest English questions and no other
language. So a perturbation is planned first, as a function of (seed, row id) alone. What it needs from the model is
`pending`, one small question each, which a pipeline asks for all rows at once, as a stage of its own, and hands to
`resolve`.
"""

import dataclasses
import enum
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from lm_jax.data.similarity import similarity
from lm_jax.errors import UserError
from musc_jax.draws import shuffled, uniform
from musc_jax.pairs.constraints import folded

SIMILAR = 0.5  # a substitute at least this similar to one of the row's constraints might change nothing
_TRIES = 64


class Kind(enum.StrEnum):
    """What became of a constraint."""

    KEPT = "kept"
    DROPPED = "dropped"
    SUBSTITUTED = "substituted"
    NEGATED = "negated"


@dataclasses.dataclass(frozen=True)
class PerturbConfig:
    """How much is perturbed, and how.

    Attributes:
      ratio: share of a row's constraints, rounded, at least one of them.
      drop, substitute, negate: shares of the three ways; they sum to 1.
      seed: with a row's id it decides everything.

    Raises:
      UserError: a ratio or share outside [0, 1], shares that do not sum to 1.
    """

    ratio: float = 0.3
    drop: float = 1.0
    substitute: float = 0.0
    negate: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name in ("ratio", "drop", "substitute", "negate"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"config.perturb.{name}={getattr(self, name)!r}: must be between 0 and 1")
        if abs((total := self.drop + self.substitute + self.negate) - 1) > 1e-6:
            raise UserError(
                f"config.perturb: drop={self.drop}, substitute={self.substitute} and negate={self.negate} sum to "
                f"{total:g}; they must sum to 1"
            )


@dataclasses.dataclass(frozen=True)
class Edit:
    """What became of one constraint.

    Attributes:
      index: its place among the full side's constraints, from 0.
      kind: what happened to it.
      old: its text.
      new: what stands in its place: `old` where kept, None where dropped or while a negation is pending.
      planned: what was drawn. It differs from `kind` where nothing could be put in the constraint's place, so that it
        was dropped instead.
    """

    index: int
    kind: Kind
    old: str
    new: str | None
    planned: Kind


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """A row's constraints, each with what became of it; the first is always kept and at least one other is not."""

    edits: tuple[Edit, ...]

    @property
    def pending(self) -> tuple[Edit, ...]:
        """Those whose negation the model has still to write."""
        return tuple(edit for edit in self.edits if edit.kind is Kind.NEGATED and edit.new is None)

    @property
    def constraints(self) -> tuple[str, ...]:
        """The perturbed side's constraints, in order.

        Raises:
          ValueError: a negation is pending.
        """
        if self.pending:
            raise ValueError(f"constraint {self.pending[0].index} waits for its negation; call resolve first")
        return tuple(edit.new for edit in self.edits if edit.new is not None)

    @property
    def kept(self) -> tuple[bool, ...]:
        """For each of the full side's constraints whether the perturbed side has it too."""
        return tuple(edit.kind is Kind.KEPT for edit in self.edits)

    def resolve(self, negations: Mapping[int, str | None]) -> "Perturbation":
        """With the model's negations put in.

        Args:
          negations: index -> text, or None where no usable one was written: that constraint is dropped. So is one
            whose negation repeats a constraint of the row, which would take no effect.

        Raises:
          KeyError: the index of a pending one is missing.
        """
        return Perturbation(tuple(self._resolved(edit, negations) for edit in self.edits))

    def rows(self) -> list[dict[str, Any]]:
        """One plain dict for each constraint, to be stored with the row."""
        return [
            {**dataclasses.asdict(edit), "kind": edit.kind.value, "planned": edit.planned.value} for edit in self.edits
        ]

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]]) -> "Perturbation":
        """The inverse of `rows`."""
        return cls(
            tuple(Edit(row["index"], Kind(row["kind"]), row["old"], row["new"], Kind(row["planned"])) for row in rows)
        )

    def _resolved(self, edit: Edit, negations: Mapping[int, str | None]) -> Edit:
        if edit not in self.pending:
            return edit
        text = negations[edit.index]
        if text is None or any(folded(text) == folded(other.old) for other in self.edits):
            return dataclasses.replace(edit, kind=Kind.DROPPED)
        return dataclasses.replace(edit, new=text)


class Pool:
    """Constraints of all rows, from which substitutes are drawn; alike whatever order the rows come in.

    A row's first constraint is its task and never stands in for another's requirement.
    """

    def __init__(self, rows: Mapping[str, Sequence[str]]):
        """`rows`: row id -> its constraints, the task first."""
        self._entries = [(row_id, text) for row_id in sorted(rows) for text in rows[row_id][1:]]

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Pool":
        """A pool of given constraints, none of them a task."""
        pool = cls({})
        pool._entries = [("", text) for text in sorted(texts)]
        return pool

    def __len__(self) -> int:
        return len(self._entries)

    def draw(self, row_id: str, taken: Sequence[str], *key: str | int) -> str | None:
        """A constraint of another row, in the script of `taken` and similar to none of them; None if none is found.

        A function of `key` and the pool alone. Large pools are tried at 64 random places.
        """
        size = len(self._entries)
        if size <= _TRIES:
            order = shuffled(range(size), *key)
        else:
            order = [int(uniform(*key, attempt) * size) for attempt in range(_TRIES)]
        script = _script(" ".join(taken))
        for owner, text in (self._entries[i] for i in order):
            if (not owner or owner != row_id) and _script(text) == script:
                if all(similarity(text, other) < SIMILAR for other in taken):
                    return text
        return None


def perturb(
    constraints: Sequence[str], row_id: str, config: PerturbConfig = PerturbConfig(), pool: Pool | None = None
) -> Perturbation:
    """Plans a row's perturbation: max(1, round(ratio * n)) of its n constraints, never the first.

    Which and how depends on (seed, row id) alone; what is substituted on the pool too. Without a substitute that fits,
    the constraint is dropped.

    Args:
      constraints: the full side's, the task first.
      pool: needed where `config.substitute` is above 0.

    Raises:
      ValueError: fewer than 2 constraints; no pool where one is needed.
    """
    if (n := len(constraints)) < 2:
        raise ValueError(f"{n} constraints, nothing but the task: such a row is dropped before")
    if config.substitute and pool is None:
        raise ValueError("substitution needs a pool")
    count = min(n - 1, max(1, round(config.ratio * n)))
    chosen = set(shuffled(range(1, n), config.seed, row_id, "which")[:count])
    edits, taken = [], list(constraints)
    for index, old in enumerate(constraints):
        planned = _kind(config, row_id, index) if index in chosen else Kind.KEPT
        kind, new = planned, old if planned is Kind.KEPT else None
        if planned is Kind.SUBSTITUTED and pool is not None:
            new = pool.draw(row_id, taken, config.seed, row_id, "substitute", index)
            kind = planned if new is not None else Kind.DROPPED
            taken += [new] if new is not None else []
        edits.append(Edit(index, kind, old, new, planned))
    return Perturbation(tuple(edits))


def _kind(config: PerturbConfig, row_id: str, index: int) -> Kind:
    draw = uniform(config.seed, row_id, "kind", index)
    if draw < config.drop:
        return Kind.DROPPED
    # Shares sum to 1 only up to rounding: without negations none is drawn
    return Kind.SUBSTITUTED if draw < config.drop + config.substitute or not config.negate else Kind.NEGATED


def _script(text: str) -> str:
    """The script of most of the text's letters, as "LATIN", "CJK", "CYRILLIC"; "" without letters."""
    names = [unicodedata.name(character, "").split(" ")[0] for character in text if character.isalpha()]
    return max(sorted(set(names)), key=names.count, default="")
