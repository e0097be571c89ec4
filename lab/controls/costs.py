"""What a stage cost: tokens that went through a model, and the model's FLOPs for them; seconds are measured outside.

Padding, recomputation and what a restart did twice are not counted. Tokens that were sampled are counted by their
text, since the ids are not kept; they may have been a few more.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lm_jax.checkpoints.settings import training_records
from lm_jax.config import ModelConfig
from lm_jax.data.supervised import SYNTHETIC
from lm_jax.data.text import TextEncoder, checked
from lm_jax.training.flops import forward_flops
from main_jax.prompts import Prompts
from main_jax.rounds.rows import forward_rows, samples

Row = dict[str, Any]
Cost = dict[str, float]  # `tokens`, `flops`


def training_cost(run: str) -> Cost:
    """Of a run directory: all its steps, forward and backward."""
    last = [record for record in training_records(run) if "num_flops" in record][-1]
    return {"tokens": last["num_tokens"], "flops": last["num_flops"]}


def forward_cost(model: ModelConfig, lengths: Iterable[int]) -> Cost:
    """Of one forward pass over texts of so many tokens."""
    lengths = np.array(list(lengths), np.int64)
    return {"tokens": int(lengths.sum()), "flops": forward_flops(model, lengths)}


def sampling_cost(
    model: ModelConfig, encoder: TextEncoder, tokenizer: Any, asked: Sequence[Row], answers: Sequence[Row]
) -> Cost:
    """Of `launch.generate`: every prompt once, and every sampled token with all before it as its context.

    Args:
      asked: rows with `prompt`.
      answers: what it wrote for them.
    """
    names = [f"prompt {number}" for number in range(len(asked))]
    prompts = [len(ids) for ids in checked(encoder.encode_prompts([row["prompt"] for row in asked], names))]
    whole, again = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        for text, reason in samples(answer):
            if text is not None:
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                whole.append(prompt + len(ids) + (reason != "length"))
                again.append(prompt)
    parts = [forward_cost(model, lengths) for lengths in (prompts, whole, again)]
    return {key: parts[0][key] + parts[1][key] - parts[2][key] for key in ("tokens", "flops")}


def filter_cost(
    models: Mapping[str, ModelConfig], encoder: TextEncoder, prompts: Prompts, candidates: Sequence[Row]
) -> Cost:
    """Of the three passes of `launch.main_filter` over the candidates that it could score.

    Args:
      models: `forward` and `reverse`.
      candidates: rows of .candidates.jsonl.
    """
    scored = [row for row in candidates if row["scores"] is not None]
    responses = {row["id"]: row["response"] for row in scored}
    read = forward_rows(scored, prompts)
    alone = [{"prompt": prompts.no_instruction(SYNTHETIC), "response": response} for response in responses.values()]
    back = [{"prompt": prompts.reverse(row["response"]), "response": row["instruction"]} for row in scored]
    parts = [
        forward_cost(models["forward"], _lengths(encoder, [*read, *alone])),
        forward_cost(models["reverse"], _lengths(encoder, back)),
    ]
    return total(parts)


def total(costs: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sums by key."""
    sums: dict[str, float] = {}
    for cost in costs:
        for key, value in cost.items():
            sums[key] = sums.get(key, 0) + value
    return sums


def _lengths(encoder: TextEncoder, rows: Sequence[Row]) -> list[int]:
    columns = (
        [row["prompt"] for row in rows],
        [row["response"] for row in rows],
        [f"text {n}" for n in range(len(rows))],
    )
    return [len(text.prompt_ids) + len(text.response_ids) for text in checked(encoder.encode_many(*columns))]
