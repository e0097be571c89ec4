"""The programs that commands compile, lowered for devices from settings and shapes alone: no weights, no data.

Each is what the command itself runs, with the shapes that it would be given.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.checkpoints.runs import abstract_params
from lm_jax.config import FULL, BatchConfig, ComputeConfig, DecodeConfig, ModelConfig
from lm_jax.data.batches import batch_shapes
from lm_jax.data.plans import Stack
from lm_jax.generation import decoding
from lm_jax.generation.requests import SamplingConfig
from lm_jax.generation.sampling import decode_rows, decoding_compute
from lm_jax.generation.token_choice import filters_of
from lm_jax.models.cache import CHUNK, cache_shapes
from lm_jax.models.decoder import check_compute
from lm_jax.models.forward import packed_statistics
from lm_jax.planning.traced import matmul_flops
from lm_jax.scoring.scoring import ARRAYS, scoring_compute
from lm_jax.sharding import batch_divisor, batch_sharding
from lm_jax.training.flops import forward_flops, forward_parts, train_flops
from lm_jax.training.objective import Objective
from lm_jax.training.program import step_program
from lm_jax.training.trainer import TrainConfig


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to compile.

    Attributes:
      name: what it is in its command.
      lowered: for the devices of a mesh.
      tokens: that one run takes, all devices together, padding included.
      model_flops: of one run whose rows are full, all devices together; recomputation is not counted.
      recompute_factor: FLOPs of its matmuls with weights over those that the model needs; None: not counted.
      beside: bytes a device of what lies in memory meanwhile and is none of its arguments.
    """

    name: str
    lowered: jax.stages.Lowered
    tokens: int
    model_flops: float
    recompute_factor: float | None = None
    beside: int = 0


def train_program(config: TrainConfig, model: ModelConfig, objective: Objective, mesh: jax.sharding.Mesh) -> Program:
    """The training step. All sequences are taken to be of `config.max_length` tokens, two of them a row.

    Raises:
      UserError: settings that do not fit the model or the mesh.
    """
    batch, lora, rows = config.batch, config.lora, config.forward_batch(mesh).rows
    num_sequences = batch.size * batch.sequences
    stack = Stack(-(-num_sequences // (2 * rows)), config.row_length)
    check_compute(config.compute)
    dtype, seed = config.compute.dtype, config.seed
    program = step_program(model, objective, config.optim, lora, dtype, mesh, 100, seed)
    with jax.set_mesh(mesh):
        shapes = batch_shapes([stack], rows, 2 // batch.sequences, mesh, objective.values, objective.auxiliary)
        traced = program.step.trace(program.state, shapes, program.frozen)
        lowered = _lower(traced, mesh)
    sequences, packed = np.full(num_sequences, config.max_length), np.full(stack.microbatches * rows, stack.row_length)
    frozen = bool(lora.rank)
    flops, matmuls = train_flops(model, sequences, frozen), (2 if frozen else 3) * forward_parts(model, packed)[0]
    if objective.auxiliary is not None:
        flops += objective.auxiliary.length_ratio * forward_flops(model, sequences)
        matmuls += objective.auxiliary.length_ratio * forward_parts(model, packed)[0]
    return Program("train", lowered, int(packed.sum()), flops, matmul_flops(traced) / matmuls)


def score_program(
    batch: BatchConfig,
    compute: ComputeConfig,
    max_length: int,
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
    precision: str = FULL,
) -> Program:
    """The scoring pass over one batch, entropies included, of a model in fp32; raises as `train_program` does.

    Args:
      precision: of its projections, as `ModelSource` has it.
    """
    check_compute(compute)
    compute, rows = scoring_compute(compute), batch.rows_in(batch_divisor(mesh))
    params = abstract_params(model, mesh, "float32", precision)
    sharding = batch_sharding(mesh)
    (stack,) = batch_shapes([Stack(1, batch.row_length)], rows, 1, mesh)
    arrays = {n: jax.ShapeDtypeStruct(stack[n].shape[1:], stack[n].dtype, sharding=sharding) for n in ARRAYS}
    with jax.set_mesh(mesh):
        traced = packed_statistics.trace(params, arrays, model, compute, ("logprobs", "entropies"))
        lowered = _lower(traced, mesh)
    packed = np.full(rows, batch.row_length)
    flops = forward_flops(model, np.full(rows * (batch.row_length // max_length), max_length))
    factor = matmul_flops(traced) / forward_parts(model, packed)[0]
    return Program("score", lowered, int(packed.sum()), flops, factor)


def decode_programs(
    decode: DecodeConfig,
    compute: ComputeConfig,
    sampling: SamplingConfig,
    dtype: str,
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
) -> list[Program]:
    """Prefill and decoding, with slots and prompts as long as `decode.max_length` and the model's context allow.

    Tokens and FLOPs of decoding are those of `decode.chunk` steps of full slots, half of their length held.

    Raises:
      UserError: a model that the mesh does not fit.
    """
    check_compute(compute)
    compute, (num_slots, num_prompts) = decoding_compute(compute), decode_rows(decode, mesh)
    context = min(decode.max_length, model.max_position)
    longest = context + -context % CHUNK
    params = abstract_params(model, mesh, dtype)
    filters, strengths = filters_of(sampling)
    slots = decoding.slot_shapes(model, compute, num_slots, context, filters.repetition_penalty, mesh)
    cache = cache_shapes(model, num_prompts, longest, compute.dtype, mesh)

    def given(kind, *shape):
        return jax.ShapeDtypeStruct(shape, kind)

    tokens, lengths = given(jnp.int32, num_prompts, longest), given(jnp.int32, num_prompts)
    with jax.set_mesh(mesh):
        prefill = decoding.prefill.trace(params, cache, tokens, lengths, given(jnp.int32), model, compute)
        keep, ends = given(bool, num_slots), given(jnp.int32, 2)
        chunk = decoding.decode.trace(params, slots, keep, ends, None, strengths, decode.chunk, model, compute, filters)
        lowered = _lower(prefill, mesh), _lower(chunk, mesh)
    made = num_slots * decode.chunk
    per_token = forward_flops(model, np.array([context])) / context  # sees half of the context on average
    prompts = np.array([context] * num_prompts)
    return [
        Program("prefill", lowered[0], num_prompts * context, forward_flops(model, prompts), beside=_bytes(slots)),
        Program("decode", lowered[1], made, made * per_token, beside=_bytes(cache)),
    ]


def _lower(traced: jax.stages.Traced, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    return traced.lower(lowering_platforms=(mesh.devices.flat[0].platform,))


def _bytes(shapes: Any) -> int:
    """Bytes a device of arrays with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(shapes))
