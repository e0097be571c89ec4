"""Self-Rewarding language models (arXiv 2401.10020): the model scores each of its responses as a whole, from 1 to 5."""

from musc_jax.pairs import judge_prompts
from musc_jax.pairs.baselines.best_of import BestOf
from musc_jax.pairs.drops import Drop
from musc_jax.pairs.judgements import parse_score
from musc_jax.pairs.prompts import Prompt
from musc_jax.pairs.row import Row
from musc_jax.pairs.sources import Source


def self_reward(source: Source, num_samples: int, judge_samples: int) -> BestOf:
    """Best of `num_samples` responses against the worst, by the mean of `judge_samples` scores."""
    return BestOf(source, num_samples, judge_samples, _question, _verdict)


def _question(row: Row, response: str) -> Prompt:
    return judge_prompts.score(row.task.text, response)


def _verdict(row: Row, answer: str, finish_reason: str) -> float | Drop:
    return parse_score(answer, finish_reason)
