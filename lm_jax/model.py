"""A language model in a few lines of Python: load it, generate, score, save it.

    import lm_jax

    model = lm_jax.load("HuggingFaceTB/SmolLM2-135M-Instruct")
    model.generate(["Name three rivers."], max_new_tokens=64)
    model.score([{"prompt": "2 + 2 =", "response": " 4"}])
    model.save("copy")
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lm_jax.checkpoints.export import ExportConfig, export
from lm_jax.checkpoints.runs import ModelSource, open_model
from lm_jax.config import BatchConfig, ComputeConfig, DecodeConfig, MeshConfig
from lm_jax.data.messages import Text
from lm_jax.data.text import TextEncoder
from lm_jax.data.tokenizers import end_token_ids, load_tokenizer
from lm_jax.errors import UserError
from lm_jax.generation.requests import Request, SamplingConfig
from lm_jax.generation.sampling import LocalGenerator
from lm_jax.models.forward import packed_logprobs
from lm_jax.scoring.command import scored_rows
from lm_jax.sharding import make_mesh

_FEWEST_SLOTS = 8  # a decoding step of fewer takes as long


@dataclasses.dataclass(frozen=True)
class Model:
    """A model on a mesh; its weights are read when they are first needed, and stay.

    Attributes:
      source: where it lies.
      dtype: of its weights in generation and of its matmuls; scores and training keep the weights in fp32.
      chat_template_kwargs: JSON of what the chat template takes besides, as `{"enable_thinking": false}`.
    """

    source: ModelSource
    mesh: jax.sharding.Mesh
    dtype: str
    chat_template_kwargs: str = ""

    @property
    def name(self) -> str:
        """What opens it again: its run directory, or the directory of its files."""
        return self.source.run or self.source.directory

    @functools.cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.source.directory, self.source.config.vocab_size, self.chat_template_kwargs)

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a response."""
        return end_token_ids(self.source.directory, self.tokenizer)

    @functools.cached_property
    def params(self) -> dict:
        """The parameters in fp32, sharded over the mesh."""
        return self.source.load_params(self.mesh, "float32")

    @property
    def compute(self) -> ComputeConfig:
        return ComputeConfig(dtype=self.dtype)

    def generate(
        self, prompts: Sequence[Text], *, max_new_tokens: int = 512, temperature: float = 0.7, **sampling: Any
    ) -> list[Any]:
        """A response for each prompt: raw text, or messages for the chat template.

        A response depends on the seed, the prompt's place in the list and the model alone.

        Args:
          max_new_tokens: of one response.
          temperature: 0 takes the likeliest token.
          sampling: other fields of `lm_jax.generation.requests.SamplingConfig`: `top_k`, `top_p`, `seed`, ...

        Returns:
          texts; lists of texts where `num_samples` is above 1.

        Raises:
          UserError: a prompt that cannot be answered (empty, or longer than the context); a setting out of its range.
        """
        config = SamplingConfig(max_new_tokens=max_new_tokens, temperature=temperature, **sampling)
        requests = [Request(str(number), prompt) for number, prompt in enumerate(prompts)]
        found: dict[str, list[str]] = {}
        for completions in self._generator(len(requests) * config.num_samples).generate(requests, config):
            for completion in completions:
                if completion.error is not None:
                    raise UserError(completion.error)
                found[completion.id] = [sample.text for sample in completion.samples]
        texts = [found[request.id] for request in requests]
        return texts if config.num_samples > 1 else [text for (text,) in texts]

    def _generator(self, sequences: int) -> LocalGenerator:
        slots = _FEWEST_SLOTS  # of few numbers, since each compiles
        while slots < min(sequences, DecodeConfig().slots):
            slots *= 2
        return self._generator_of(slots)

    @functools.cached_property
    def _generator_of(self):
        @functools.cache
        def make(slots: int) -> LocalGenerator:
            decode = DecodeConfig(slots=slots)
            params = self.params if self.dtype == "float32" else self._cast_params
            config = self.source.config
            return LocalGenerator(params, config, self.tokenizer, self.end_ids, self.compute, decode, self.mesh)

        return make

    @functools.cached_property
    def _cast_params(self) -> dict:
        return self.source.load_params(self.mesh, self.dtype)

    def score(self, rows: Sequence[Mapping[str, Any]], *, max_length: int = 2048) -> list[dict[str, Any]]:
        """The rows (`prompt`, `response`) with `logprob`, `num_tokens`, `token_logprobs`, `token_entropies` (nats).

        Args:
          max_length: tokens of prompt and response; longer responses are cut.

        Raises:
          UserError: rows that cannot be scored, all of them named.
        """
        encoder = TextEncoder(self.tokenizer, max_length, self.end_ids)
        batch = BatchConfig(row_length=max_length)
        return scored_rows(rows, "rows", encoder, self.params, self.source.config, self.compute, batch, self.mesh)

    def logprobs(self, params: dict, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Log-probs [B, T] fp32 (nats) of the response tokens of packed rows, 0 elsewhere; differentiable in `params`.

        For losses of your own, see `lm_jax.train`.
        """
        return packed_logprobs(params, dict(batch), self.source.config, self.compute)

    def save(self, output: str, *, dtype: str = "bfloat16", adapter: bool = False) -> None:
        """Writes a Hugging Face directory with tokenizer, templates and, of a trained model, its card.

        Args:
          dtype: of the weights; bfloat16 rounds small changes of a float32 model away.
          adapter: of a model that trained adapters: these alone, as PEFT loads them.

        Raises:
          UserError: `output` is there already; no adapters where they were asked for.
        """
        export(ExportConfig(model=self.name, output=output, step=self.source.step, dtype=dtype, adapter=adapter))


def load(
    model: str,
    *,
    mesh: Mapping[str, int] | None = None,
    dtype: str | None = None,
    step: int | None = None,
    chat_template_kwargs: str = "",
) -> Model:
    """Finds a model: a Hugging Face directory, a hub id, a GGUF file, a PEFT adapter, or a run directory.

    Args:
      mesh: sizes of `data`, `fsdp`, `tensor`, as {"tensor": 8}; by default all devices along `fsdp`.
      dtype: float32, the default on CPUs, or bfloat16, the default elsewhere.
      step: which checkpoint of a run; None: the newest.

    Raises:
      UserError: nothing there, an architecture that is not supported, a mesh that does not fit.
    """
    platform = jax.devices()[0].platform
    made = make_mesh(MeshConfig(**(mesh or {})))
    dtype = dtype or ("float32" if platform == "cpu" else "bfloat16")
    return Model(open_model(model, step), made, dtype, chat_template_kwargs)
