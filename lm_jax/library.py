"""A language model in a few lines of Python: load it, generate, score, train, save it. See docs/library.md."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lm_jax.checkpoints.export import ExportConfig, export
from lm_jax.checkpoints.provenance import Method
from lm_jax.checkpoints.runs import ModelSource, open_model
from lm_jax.config import BatchConfig, ComputeConfig, DecodeConfig, ExampleBatch, MeshConfig, from_settings
from lm_jax.console import say
from lm_jax.data.faults import Faults
from lm_jax.data.messages import Text
from lm_jax.data.rows import write_jsonl
from lm_jax.data.supervised import load_supervised
from lm_jax.data.text import TextEncoder
from lm_jax.data.tokenizers import end_token_ids, load_tokenizer
from lm_jax.errors import UserError
from lm_jax.generation.requests import Request, SamplingConfig
from lm_jax.generation.sampling import LocalGenerator
from lm_jax.models.forward import packed_logprobs
from lm_jax.scoring.command import scored_rows
from lm_jax.sharding import make_mesh
from lm_jax.training.objective import Objective, name_of
from lm_jax.training.supervised import supervised_objective
from lm_jax.training.trainer import Data, TrainConfig, Trainer

Rows = str | os.PathLike[str] | Sequence[Mapping[str, Any]]  # a file, or the rows themselves
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
        config = SamplingConfig(max_new_tokens, temperature, **sampling)
        requests = [Request(str(number), prompt) for number, prompt in enumerate(prompts)]
        found: dict[str, list[str]] = {}
        for completions in self._generator(len(requests) * config.num_samples).generate(requests, config):
            for completion in completions:
                if completion.error is not None:
                    raise UserError(f"prompts[{completion.id}]: {completion.error}")
                found[completion.id] = [sample.text for sample in completion.samples]
        texts = [found[request.id] for request in requests]
        return texts if config.num_samples > 1 else [text for (text,) in texts]

    def score(self, rows: Sequence[Mapping[str, Any]], *, max_length: int = 2048) -> list[dict[str, Any]]:
        """The rows (`prompt`, `response`) with `logprob`, `num_tokens`, `token_logprobs`, `token_entropies` (nats).

        Args:
          max_length: tokens of prompt and response; longer responses are cut.

        Raises:
          UserError: rows that cannot be scored, all of them named.
        """
        encoder = TextEncoder(self.tokenizer, max_length, self.end_ids)
        batch = BatchConfig(row_length=max_length)
        load = lambda: self.params  # noqa: E731
        options = encoder, load, self.source.config, self.compute, batch, self.mesh
        return scored_rows([dict(row) for row in rows], Faults("rows"), *options)[0]

    def logprobs(self, params: dict, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Log-probs [B, T] fp32 (nats) of the response tokens of packed rows, 0 elsewhere; differentiable in `params`.

        For losses of your own; see `lm_jax.train`.
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
        export(ExportConfig(model=self.source.name, output=output, step=self.source.step, dtype=dtype, adapter=adapter))

    def _generator(self, sequences: int) -> LocalGenerator:
        slots = _FEWEST_SLOTS  # of few numbers, since each compiles
        while slots < min(sequences, DecodeConfig().slots):
            slots *= 2
        if slots not in self._generators:
            params = self.params if self.dtype == "float32" else self._cast_params
            self._generators[slots] = LocalGenerator(
                params,
                self.source.config,
                self.tokenizer,
                self.end_ids,
                self.compute,
                DecodeConfig(slots=slots),
                self.mesh,
            )
        return self._generators[slots]

    @functools.cached_property
    def _generators(self) -> dict[int, LocalGenerator]:
        return {}

    @functools.cached_property
    def _cast_params(self) -> dict:
        return self.source.load_params(self.mesh, self.dtype)


def load(
    model: str | os.PathLike[str],
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
    made = make_mesh(MeshConfig(**(mesh or {})))
    dtype = dtype or ("float32" if jax.devices()[0].platform == "cpu" else "bfloat16")
    return Model(open_model(os.fspath(model), step), made, dtype, chat_template_kwargs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedConfig(TrainConfig):
    """The settings of `train`."""

    batch: ExampleBatch = ExampleBatch()


def train(
    model: Model,
    rows: Rows,
    objective: Objective | None = None,
    *,
    output: str,
    learning_rate: float = 1e-5,
    **settings: Any,
) -> Model:
    """Trains on supervised rows, in any layout of docs/data.md, or goes on with a run that was interrupted.

    Args:
      rows: the rows, or their file.
      objective: what is minimised over them; None: the mean cross-entropy of the responses' tokens.
      output: the run directory, with metrics, checkpoints and plots.
      settings: other fields of `TrainConfig`, nested ones as dicts: `epochs=1, batch={"examples": 8}`.

    Returns:
      The trained model, the run's newest checkpoint.

    Raises:
      UserError: anything the user can mend, naming row or setting.
    """
    given = {**settings_of(model, rows, output), **settings}
    given["optim"] = {"learning_rate": learning_rate, **given.get("optim", {})}
    config = from_settings(SupervisedConfig, **given)
    trainer = Trainer(config)
    paths = [config.input, *([config.eval_input] if config.eval_input else [])]
    read = [
        load_supervised(path, trainer.encoder, columns=config.columns, max_dropped_share=config.max_dropped_share)
        for path in paths
    ]
    for own in read:
        say("\n".join(own.report))
    data = [Data([(segment,) for segment in own.segments], own.name) for own in read]
    # The run's settings do not hold the objective, and another one must not go on with the run
    what = "lm_jax.train" if objective is None else f"lm_jax.train with the loss {name_of(objective.loss)}"
    method = Method(f"Supervised training: `{what}`.", ("sft",))
    trainer.begin(what, method, [own.faults for own in read], [own.examples for own in data])
    minimised = objective or supervised_objective(trainer.policy.config, config.compute)
    trainer.fit(minimised, data[0], data[1] if config.eval_input else None, shown={"loss": "loss"})
    return trained(model, output)


def settings_of(model: Model, rows: Rows, output: str) -> dict[str, Any]:
    """What a command that reads rows is told of a model: where it lies, on which mesh, in which dtype.

    Raises:
      UserError: an older checkpoint of a run, which a command, that takes the newest, would not read.
    """
    source = model.source
    if source.run and (newest := open_model(source.name).step) != source.step:
        raise UserError(
            f"{source.name}: step {source.step} was loaded and step {newest} is the newest, which would be taken; save "
            "the model to a directory and load that"
        )
    return {
        "model": source.name,
        "input": rows_file(rows, output),
        "output": output,
        "mesh": dict(model.mesh.shape),
        "dtype": model.dtype,
        "chat_template_kwargs": model.chat_template_kwargs,
    }


def rows_file(rows: Rows, output: str) -> str:
    """The file of rows; those that are given themselves are written beside `output`, where a run finds them again."""
    if isinstance(rows, str | os.PathLike):
        return os.fspath(rows)
    path = f"{output.rstrip('/').removesuffix('.jsonl')}.input.jsonl"
    write_jsonl(path, rows)
    return path


def trained(model: Model, run: str) -> Model:
    """What a run made of a model, on the same mesh."""
    return Model(open_model(run), model.mesh, model.dtype, model.chat_template_kwargs)
