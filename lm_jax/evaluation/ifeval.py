"""IFEval (arXiv 2311.07911): the share of verifiable instructions that responses follow, by lm-eval's checkers.

Strict judges the response as it is; loose takes the best of it and seven variants, without its first line, its last
line, or asterisks. A prompt is followed if all of its instructions are.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lm_jax.data.rows import read_rows
from lm_jax.errors import UserError
from lm_jax.evaluation.lm_eval_setup import prepare_ifeval


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt and what can be verified of its response.

    Attributes:
      text: as it was given.
      instructions: ids such as `punctuation:no_comma`.
      kwargs: the arguments of each; null, 0 and empty ones count as not given.
      where: file and row, for errors.
    """

    text: str
    instructions: tuple[str, ...]
    kwargs: tuple[Mapping[str, Any], ...]
    where: str


def read_prompts(path: str) -> list[Prompt]:
    """Reads rows with `prompt`, `instruction_id_list` and `kwargs`, as google/IFEval has them.

    Raises:
      UserError: a row that is not of this form, a prompt that is there twice.
    """
    prompts: list[Prompt] = []
    first: dict[str, int] = {}
    for number, row in enumerate(read_rows(path, ("prompt", "instruction_id_list", "kwargs"))):
        where = f"{path} row {number}"
        text, ids, kwargs = row["prompt"], row["instruction_id_list"], row["kwargs"]
        if not isinstance(text, str):
            raise UserError(f"{where}: prompt must be a string, got {type(text).__name__}; mend the row")
        if not isinstance(ids, list) or not ids or not all(isinstance(i, str) for i in ids):
            raise UserError(
                f"{where}: instruction_id_list must be a list of at least one id, got {ids!r}; mend the row"
            )
        if not isinstance(kwargs, list) or len(kwargs) != len(ids) or not all(isinstance(k, dict) for k in kwargs):
            raise UserError(
                f"{where}: kwargs must be a list of objects, one for each of the {len(ids)} instructions; mend the row"
            )
        if (before := first.setdefault(text, number)) != number:
            raise UserError(f"{where}: the same prompt as row {before}; drop one of them")
        prompts.append(Prompt(text, tuple(ids), tuple(kwargs), where))
    return prompts


def score_responses(prompts: Sequence[Prompt], responses: Sequence[str | None]) -> dict[str, Any]:
    """Accuracies in [0, 1] over the prompts that have a response.

    Returns:
      `prompt_level_strict_acc`, `inst_level_strict_acc`, `prompt_level_loose_acc`, `inst_level_loose_acc`;
      `num_prompts`, `num_instructions`, `num_missing`; `sentence_splitter` (see `lm_eval_setup.prepare_ifeval`); and
      `instructions`: id -> `num`, `strict_acc`, `loose_acc`.

    Raises:
      UserError: an instruction that is unknown, or whose arguments are not those that it takes; the extra `eval` is not
        installed.
    """
    splitter = prepare_ifeval()
    from lm_eval.tasks.ifeval import utils

    for prompt in prompts:
        _check_instructions(prompt)
    checks = (utils.test_instruction_following_strict, utils.test_instruction_following_loose)
    followed: list[tuple[str, bool, bool]] = []
    whole: list[tuple[bool, bool]] = []
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if response is not None:
            example = utils.InputExample(number, list(prompt.instructions), prompt.text, list(prompt.kwargs))
            strict, loose = (check(example, response).follow_instruction_list for check in checks)
            followed += zip(prompt.instructions, strict, loose, strict=True)
            whole.append((all(strict), all(loose)))
    by_id = {i: [f[1:] for f in followed if f[0] == i] for i in sorted({f[0] for f in followed})}
    scores = {}
    each = [f[1:] for f in followed]
    for i, name in enumerate(("strict", "loose")):
        scores[f"prompt_level_{name}_acc"] = _mean([w[i] for w in whole])
        scores[f"inst_level_{name}_acc"] = _mean([f[i] for f in each])
    return {
        **scores,
        "num_prompts": len(whole),
        "num_instructions": len(followed),
        "num_missing": len(prompts) - len(whole),
        "sentence_splitter": splitter,
        "instructions": {
            name: {"num": len(f), "strict_acc": _mean([s for s, _ in f]), "loose_acc": _mean([x for _, x in f])}
            for name, f in by_id.items()
        },
    }


def _check_instructions(prompt: Prompt) -> None:
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    for name, kwargs in zip(prompt.instructions, prompt.kwargs, strict=True):
        if name not in INSTRUCTION_DICT:
            raise UserError(
                f"{prompt.where}: unknown instruction {name!r}; known are {', '.join(sorted(INSTRUCTION_DICT))}"
            )
        # The checkers fill in what is missing at random. The hub's form of the data names every argument there is, null
        # where an instruction does not take it
        takes = set(INSTRUCTION_DICT[name](name).get_instruction_args_keys())
        if takes != (given := {k for k, v in kwargs.items() if v}):
            raise UserError(
                f"{prompt.where}: {name} takes the arguments {sorted(takes) or 'none'}, but kwargs has "
                f"{sorted(given) or 'none'}; mend the row"
            )


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
