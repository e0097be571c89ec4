"""The generator that a command's settings name: a model that runs here, or one behind an endpoint."""

import dataclasses
from typing import Any, Protocol

import jax

from lm_jax.checkpoints.runs import ModelSource, open_model
from lm_jax.config import ComputeConfig, DecodeConfig, MeshConfig
from lm_jax.data.messages import TEMPLATE_KWARGS, read_template_kwargs
from lm_jax.data.tokenizers import end_token_ids, load_tokenizer, tokenizer_fingerprint
from lm_jax.errors import UserError
from lm_jax.generation.requests import Generator
from lm_jax.generation.sampling import LocalGenerator
from lm_jax.generation.stopping import resolve_stops
from lm_jax.models.decoder import check_compute
from lm_jax.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
    """An OpenAI-compatible server; no `url`: the model runs here."""

    url: str = ""
    model: str = ""
    concurrency: int = 32
    timeout: float = 600.0  # seconds


class ModelKeys(Protocol):
    """What the config of a command that generates has, among other keys."""

    @property
    def model(self) -> str | None: ...

    @property
    def chat_template_kwargs(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def decode(self) -> DecodeConfig: ...

    @property
    def endpoint(self) -> EndpointConfig: ...

    @property
    def mesh(self) -> MeshConfig: ...

    @property
    def compute(self) -> ComputeConfig: ...


@dataclasses.dataclass(frozen=True)
class Local:
    """What of a model on disk is read before its weights."""

    source: ModelSource
    tokenizer: Any
    end_ids: tuple[int, ...]
    mesh: jax.sharding.Mesh


def check_one_model(config: ModelKeys) -> None:
    """Raises UserError where both a model and an endpoint are given."""
    if config.endpoint.url and config.model is not None:
        raise UserError(
            f"config.model={config.model!r} and config.endpoint.url={config.endpoint.url!r}: the model runs either "
            "here or behind the endpoint, under the name config.endpoint.model; leave one of the two out"
        )


def local_mesh(config: ModelKeys) -> jax.sharding.Mesh:
    """The mesh of a model that runs here; raises UserError for what of its settings is wrong without reading it."""
    if not config.model:
        raise UserError("config.model: not set; give --config.model=VALUE, or --config.endpoint.url for a server")
    check_compute(config.compute)
    return make_mesh(config.mesh)


def open_local(config: ModelKeys, mesh: jax.sharding.Mesh, stop: tuple[str | int, ...] = ()) -> Local:
    """Finds the model; reads no weights.

    Raises:
      UserError: no model there, a tokenizer that does not fit it, an unknown token in `stop`.
    """
    source = open_model(config.model or "")  # `local_mesh` refuses none
    tokenizer = load_tokenizer(source.directory, source.config.vocab_size, config.chat_template_kwargs)
    end_ids = end_token_ids(source.directory, tokenizer)
    resolve_stops(stop, tokenizer, end_ids)  # raises while nothing slow has begun
    return Local(source, tokenizer, end_ids, mesh)


def load_local(config: ModelKeys, local: Local | None) -> Generator:
    """Reads the weights of what `open_local` found."""
    if local is None:
        raise ValueError("no model was opened here: another generator answers")
    params = local.source.load_params(local.mesh, config.dtype)
    return LocalGenerator(
        params, local.source.config, local.tokenizer, local.end_ids, config.compute, config.decode, local.mesh
    )


def open_endpoint(config: EndpointConfig, chat_template_kwargs: str) -> Generator:
    """Asks nothing yet; raises UserError for a setting out of its range."""
    from lm_jax.generation.endpoints import EndpointGenerator

    kwargs = read_template_kwargs(chat_template_kwargs, f"config.{TEMPLATE_KWARGS}")
    try:
        # Which share may fail is decided over all rows: of a restart's few rows more may fail
        return EndpointGenerator(
            config.url,
            config.model,
            concurrency=config.concurrency,
            timeout=config.timeout,
            max_failed_share=1.0,
            chat_template_kwargs=kwargs,
        )
    except UserError as error:
        raise UserError(f"config.endpoint.{error}") from error


def model_identity(config: ModelKeys, local: Local | None) -> dict[str, Any]:
    """What of the model generated rows depend on. Where it runs, in which batches and on what devices may change.

    Args:
      local: None where another generator answers, an endpoint's for one.
    """
    kwargs = {f"config.{TEMPLATE_KWARGS}": read_template_kwargs(config.chat_template_kwargs, TEMPLATE_KWARGS)}
    if local is None:
        return {"model": "endpoint", "config.endpoint.model": config.endpoint.model, **kwargs}
    return {
        "model": "here",
        **kwargs,
        "config.dtype": config.dtype,
        "config.decode.max_length": config.decode.max_length,
        "config.compute.dtype": config.compute.dtype,
        "fingerprint of config.model": local.source.fingerprint,
        "fingerprint of its tokenizer": tokenizer_fingerprint(local.tokenizer),
        "end tokens": local.end_ids,
    }
