"""What a generator is asked for and what it answers, the same whether the model runs here or behind an endpoint."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

from lm_jax.data.messages import Text
from lm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen. Filters apply in this order: repetition penalty, temperature, top-k, top-p, min-p.

    Attributes:
      max_new_tokens: of one response, its end token included.
      temperature: logits are divided by it; 0 takes the likeliest token.
      top_k: only this many likeliest tokens, and those that tie with the last; 0 for all.
      top_p: only the likeliest tokens that together reach this probability; 1 for all.
      min_p: only tokens at least this share as likely as the likeliest; 0 for all.
      repetition_penalty: logits of tokens already in prompt or response are divided by it where positive, multiplied
        where negative (arXiv 1909.05858, section 4.1); 1 for none.
      num_samples: responses of each prompt.
      stop: texts, or token ids, that end a response and are left out of it, besides the model's own end tokens.
      seed: with a request's id, a sample's index and a token's position it decides every random draw.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    num_samples: int = 1
    stop: tuple[str | int, ...] = ()
    seed: int = 0

    def __post_init__(self):
        for name, fits, say in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or a positive number"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 (off) and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "a positive number; 1 is off"),
            ("num_samples", self.num_samples >= 1, "at least 1"),
            ("seed", 0 <= self.seed < 2**32, "between 0 and 2**32 - 1"),
        ):
            if not fits:
                raise UserError(f"config.{name}={getattr(self, name)!r}: must be {say}")
        if "" in self.stop:
            raise UserError("config.stop: an empty text would stop everything; leave it out")


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
      id: names the row, in errors and for its random stream; unique within a run.
      prompt: raw text, or messages for the chat template.
      max_new_tokens: below the sampling's own, or None for that.
      token_ids: the prompt as the model reads it, in place of the text; for a model that runs here alone.
      think_end: what ends thoughts, as "</think>": stop texts count behind it alone, if the prompt or the response
        opens thoughts; for a model that runs here alone. Empty: they count anywhere.
    """

    id: str
    prompt: Text
    max_new_tokens: int | None = None
    token_ids: tuple[int, ...] | None = None
    think_end: str = ""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One response.

    Attributes:
      text: without end token and without the stop that ended it.
      finish_reason: "stop" (an end token or a stop) or "length".
      num_tokens: generated, the end token included; None from an endpoint that gave only the sum of several samples.
      token_ids: those tokens; None from an endpoint.
      logprobs: nats, of the model's own distribution (before filters and temperature); None from an endpoint.
    """

    text: str
    finish_reason: str
    num_tokens: int | None
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """The answer to a request: `num_samples` samples, or an error (one line) and none."""

    id: str
    samples: tuple[Sample, ...]
    error: str | None = None


class Generator(Protocol):
    """Answers requests; see `sampling.LocalGenerator` and `endpoints.EndpointGenerator`.

    One with an attribute `collective` that is true takes all processes of a run, which make the same calls; of another
    one process 0 alone has need.
    """

    def generate(self, requests: Sequence[Request], sampling: SamplingConfig) -> Iterator[list[Completion]]:
        """Every request's completion exactly once, in lists, as they finish and in any order.

        A request that cannot be answered (a prompt that is empty, of the wrong type or too long; a server that keeps
        failing) gives a completion with an error and does not stop the others.

        Raises:
          UserError: what no request can be answered with, as an unknown stop token.
        """
        ...
