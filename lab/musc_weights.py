"""Weights of tokens that the lab gives by itself, and what the rules weigh: by what a dropped constraint decides."""

from collections.abc import Sequence

import numpy as np

from lab.arms import Row
from lab.worlds.governed import GOVERNED, dropped, labels
from lab.worlds.world import World
from lm_jax.data.score_store import ScoreStore

SIDES = ("chosen", "rejected")


def constant_weights(rows: Sequence[Row], store: str, rule: str) -> list[Row]:
    """The rows with token scores of their own, all the mean that `rule` has over all tokens of the store.

    Args:
      rows: of `launch.musc_token_weights`.
      store: where their weights lie.
    """
    weights = ScoreStore.open(store)
    values = weights.read(np.arange(len(weights.lengths)))[rule]
    mean = round(float(np.concatenate(values).mean(dtype=np.float64)), 6)
    return [_with_scores(row, [[mean] * int(weights.lengths[n]) for n in _places(row)]) for row in rows]


def placed_weights(world: World, rows: Sequence[Row], store: str, inside: float, outside: float) -> list[Row]:
    """The rows with token scores of their own: `inside` where a dropped constraint decides a token, else `outside`.

    Args:
      rows: of `launch.musc_token_weights`; all scores are `outside` where the prompts do not show what was dropped, or
        the world does not cut a response into as many tokens as the tokenizer did.
      store: where their weights lie.
    """
    weights, made = ScoreStore.open(store), []
    for row in rows:
        scores = [np.where(found == GOVERNED, inside, outside).tolist() for found in _labelled(world, row, weights)]
        made.append(_with_scores(row, scores))
    return made


def _with_scores(row: Row, scores: Sequence[Sequence[float]]) -> Row:
    rest = {name: value for name, value in row.items() if name != "token_weights"}
    return rest | {f"{side}_token_scores": list(values) for side, values in zip(SIDES, scores, strict=True)}


def _places(row: Row) -> range:
    """Where a row's responses stand in its store, the chosen one first."""
    first = 2 * row["token_weights"]["row"]
    return range(first, first + 2)


def _labelled(world: World, row: Row, store: ScoreStore) -> list[np.ndarray]:
    """Of each of SIDES the label of every token; "" where there is none to tell."""
    governing = dropped(world, *(row[key][-1]["content"] for key in ("prompt", "perturbed_prompt")))
    made = []
    for side, number in zip(SIDES, _places(row), strict=True):
        found = np.array(labels(world, governing, row[side][-1]["content"]))
        fits = governing and len(found) == store.lengths[number]
        made.append(found if fits else np.full(store.lengths[number], ""))
    return made


def mean_weights(world: World, rows: Sequence[Row], store: str, rules: Sequence[str]) -> Row:
    """How much each rule weighs the tokens of each label: `weights_SIDE_LABEL` -> rule -> mean.

    Left out: rows whose prompts do not show what was dropped, responses that the world does not cut into as many tokens
    as the tokenizer did, labels that no token has.

    Args:
      rows: of `launch.musc_token_weights`.
      store: where their weights lie.
    """
    weights = ScoreStore.open(store)
    values = weights.read(np.arange(len(weights.lengths)))
    found: dict[tuple[str, str], dict[str, list[np.ndarray]]] = {}
    for row in rows:
        for side, number, labelled in zip(SIDES, _places(row), _labelled(world, row, weights), strict=True):
            for label in set(labelled) - {""}:
                of_label = found.setdefault((side, label), {rule: [] for rule in rules})
                for rule in rules:
                    of_label[rule].append(values[rule][number][labelled == label])
    return {
        f"weights_{side}_{label}": {rule: float(np.concatenate(parts).mean()) for rule, parts in by_rule.items()}
        for (side, label), by_rule in sorted(found.items())
    }
