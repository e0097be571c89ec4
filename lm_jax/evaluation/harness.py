"""A model of ours as lm-eval sees one. Imports lm-eval: load it after `lm_eval_setup.require_lm_eval`.

What is asked and how it is cut is as in lm-eval's own `hf` model, so that both give the same numbers.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jinja2
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lm_jax.checkpoints.runs import ModelSource
from lm_jax.config import BatchConfig, ComputeConfig, DecodeConfig
from lm_jax.console import Progress
from lm_jax.data.chat import render_chat
from lm_jax.data.packing import Segment
from lm_jax.data.tokenizers import end_token_ids, load_tokenizer
from lm_jax.errors import UserError
from lm_jax.generation.answer_text import thoughts_opening, without_thoughts
from lm_jax.generation.requests import Request, SamplingConfig
from lm_jax.generation.sampling import LocalGenerator
from lm_jax.scoring.scoring import score

_MAX_GEN_TOKS = 256  # of a task that does not say; lm-eval's default
_FILTERS = ("top_k", "top_p", "min_p")  # of sampling; greedy text does not depend on them
_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "num_beams", *_FILTERS, "repetition_penalty"}

Encoded = tuple[tuple[str, str] | None, list[int], list[int]]  # (what was asked or None, context ids, continuation ids)


class JaxLM(TemplateLM):
    """Answers lm-eval's requests with a model that runs here.

    Args:
      source: the model; its weights are read now, in `dtype`.
      name: what lm-eval calls its tokenizer.
      max_length: tokens that a question and its answer may have together; what is longer loses its beginning.
      batch: of scoring; a row holds more than `max_length` tokens.
      decode: of generation; a slot holds at least `max_length` tokens.
      seed: of tasks that sample.
      chat_template_kwargs: of `load_tokenizer`.
      think_end: what ends an answer's thoughts, which are no part of it; empty: they are.

    Attributes:
      truncated: requests that lost their beginning so far; a question with choices makes one for each.

    Raises:
      UserError: a tokenizer that does not fit, weights that cannot be read.
    """

    def __init__(
        self,
        source: ModelSource,
        name: str,
        mesh: jax.sharding.Mesh,
        dtype: str,
        max_length: int,
        compute: ComputeConfig,
        batch: BatchConfig,
        decode: DecodeConfig,
        seed: int,
        chat_template_kwargs: str,
        think_end: str,
    ):
        super().__init__()
        self.tokenizer = load_tokenizer(source.directory, source.config.vocab_size, chat_template_kwargs)
        self._think_end = think_end
        self.max_length = min(max_length, source.config.max_position)
        self.truncated = 0
        self._name, self._config, self._mesh = name, source.config, mesh
        self._compute, self._batch, self._seed = compute, batch, seed
        end_ids = end_token_ids(source.directory, self.tokenizer)
        self._params = source.load_params(mesh, dtype)
        self._generator = LocalGenerator(self._params, source.config, self.tokenizer, end_ids, compute, decode, mesh)
        self._specials = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with the tokenizer's own special tokens, unless the text begins with them or they are unwanted."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; without its system message where the template refuses one."""
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{self._name}: config.apply_chat_template is set but the tokenizer has no chat template; leave it out "
                "for a base model"
            )
        options = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return render_chat(self.tokenizer, chat_history, **options)
        except jinja2.exceptions.TemplateError:
            others = [message for message in chat_history if message["role"] != "system"]
            return render_chat(self.tokenizer, others, **options)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-prob of each whole text in nats, in windows of `max_length` tokens."""
        windows: list[Encoded] = []
        counts = []
        for (text,) in (request.args for request in requests):
            found = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            windows += (own := [(None, *make_disjoint_window(window)) for window in found])
            counts.append(len(own))
        logprobs = iter(self._loglikelihood_tokens(windows))
        return [sum(next(logprobs)[0] for _ in range(count)) for count in counts]

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **_: Any) -> list[tuple[float, bool]]:
        """(log-prob of the continuation in nats, whether it is what greedy decoding gives) for each request."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)  # of an empty continuation
        wanted = [i for i, (_, _, continuation) in enumerate(requests) if continuation]
        segments = [self._segment(*requests[i]) for i in wanted]
        progress, done = Progress(len(segments), 0, "continuation"), 0
        options: dict[str, Any] = {"with_entropies": False, "with_top1": True}
        for group in score(self._params, segments, self._config, self._compute, self._batch, self._mesh, **options):
            for scores in group:
                logprob = float(scores.logprobs.sum(dtype=np.float64))
                if not np.isfinite(logprob):
                    raise UserError(f"{self._name}: a log-prob is {logprob}; check the checkpoint, or use float32")
                found[wanted[scores.row]] = (logprob, scores.top1 is not None and bool(scores.top1.all()))
            done += len(group)
            progress.update(done, {})
        progress.close()
        return found

    def _segment(self, asked: tuple[str, str] | None, context: list[int], continuation: list[int]) -> Segment:
        # The last token is only predicted, so one more than the model reads
        if len(continuation) > self.max_length:
            raise UserError(
                f"{self._name}: a continuation has {len(continuation)} tokens and max_length is {self.max_length} "
                f"({(asked or ('', ''))[1][:60]!r}); raise config.max_length, or leave the task out"
            )
        kept = context[-(self.max_length + 1 - len(continuation)) :]
        self.truncated += len(kept) < len(context)
        return Segment(np.asarray(kept, np.int32), np.asarray(continuation, np.int32))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to the first of the request's stops."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        answers = [""] * len(requests)
        progress, done = Progress(len(requests), 0, "answer"), 0
        for numbers in groups.values():
            stops, sampling = self._sampling(requests[numbers[0]].args[1])
            asked = [self._request(number, requests[number].args[0], sampling.max_new_tokens) for number in numbers]
            for completions in self._generator.generate(asked, sampling):
                for completion in completions:
                    if completion.error is not None:
                        raise UserError(f"{self._name}: {completion.error}")
                    number = int(completion.id)
                    text = self._answer(requests[number].args[0], completion.samples[0].token_ids or ())
                    answers[number] = postprocess_generated_text(text, stops, None)
                done += len(completions)
                progress.update(done, {})
        progress.close()
        return answers

    def _answer(self, context: str, ids: Sequence[int]) -> str:
        """The text of `ids` without thoughts; nothing where they do not end."""
        end, opening = self._think_end, thoughts_opening(self._think_end)
        opened = opening if context.rstrip().endswith(opening) else ""
        if without_thoughts(opened + self.tokenizer.decode(ids), end) is None:
            return ""
        token = self.tokenizer.convert_tokens_to_ids(end) if end in self._specials else None
        if token in ids:  # decoding may leave it out
            after = ids[max(i + 1 for i, own in enumerate(ids) if own == token) :]
            return self.tokenizer.decode(after, skip_special_tokens=True).lstrip()
        return without_thoughts(self.tokenizer.decode(ids, skip_special_tokens=True), end) or ""

    def _request(self, number: int, context: str, max_new_tokens: int) -> Request:
        room = self.max_length - max_new_tokens
        if room < 1:
            raise UserError(
                f"{self._name}: the task asks for answers of {max_new_tokens} tokens and max_length is "
                f"{self.max_length}; raise config.max_length (the model's context bounds it), or leave the task out"
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        self.truncated += len(ids) > room
        return Request(str(number), "", token_ids=tuple(ids[-room:]), think_end=self._think_end)

    def _sampling(self, given: dict[str, Any]) -> tuple[list[str], SamplingConfig]:
        """(texts that end an answer, how it is drawn), from a task's generation settings."""
        kwargs = normalize_gen_kwargs(given, _MAX_GEN_TOKS)
        if unknown := sorted(set(kwargs) - _KNOWN):
            raise UserError(
                f"{self._name}: a task sets {unknown[0]!r} for generation, which is not built here; leave it out"
            )
        if kwargs.get("num_beams") not in (None, 1):
            raise UserError(f"{self._name}: a task asks for beam search, which is not built here; leave it out")
        stops = handle_stop_sequences(kwargs["until"], self.tokenizer.decode([self.eot_token_id]))
        sampled = kwargs["do_sample"]
        names = ("repetition_penalty", *(_FILTERS if sampled else ()))
        sampling = SamplingConfig(
            max_new_tokens=kwargs["max_gen_toks"],
            temperature=kwargs.get("temperature", 1.0) if sampled else 0.0,
            # What is written like another model's special token would be refused; the text is cut at it afterwards
            stop=tuple(s for s in stops if s and (s in self._specials or not s.startswith("<|"))),
            seed=self._seed,
            **{name: kwargs[name] for name in names if kwargs.get(name) is not None},
        )
        return stops, sampling
