"""Hidden states -> log-prob of the target token and entropy, without ever holding [tokens, vocabulary].

Axes: B rows, T tokens, C tokens of a chunk, D model, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm_jax.models.linear import contract_rows
from lm_jax.sharding import BATCH_AXES, batch_divisor, constrain


def token_logprobs(
    hidden: jax.Array, embedding: jax.Array, targets: jax.Array, mask: jax.Array, chunk: int, with_entropy: bool = True
) -> tuple[jax.Array, jax.Array | None]:
    """(log-probs [B, T], entropies [B, T] or None): `token_statistics` where nothing else is wanted."""
    names = ("logprobs", "entropies") if with_entropy else ("logprobs",)
    found = token_statistics(hidden, embedding, targets, mask, chunk, names)
    return found["logprobs"], found.get("entropies")


def token_statistics(
    hidden: jax.Array, embedding: jax.Array, targets: jax.Array, mask: jax.Array, chunk: int, names: tuple[str, ...]
) -> dict[str, jax.Array]:
    """What is asked for of each target and the distribution it comes from, fp32, in chunks of `chunk` tokens a row.

    The gradient recomputes a chunk's logits, so memory is B * chunk * V however long the rows are. Only masked-in
    tokens are worked on: they are moved to the front of their row and chunks that no row needs are skipped.

    Args:
      hidden: [B, T, D] after the final norm.
      embedding: [V, D], the output embedding.
      targets: [B, T] int32, the token that follows.
      mask: [B, T], nonzero where a result is wanted.
      chunk: tokens of a row whose logits exist at one time.
      names: among `logprobs` of the targets and `entropies` of the distributions, in nats, and `top1`: 1 where the
        target is the likeliest token, else 0; no gradient goes through it. Training has no use for entropies, and
        their gradient costs passes over the logits.

    Returns:
      {name: [B, T]}, zero where the mask is zero.
    """
    length = hidden.shape[1]
    chunk = min(chunk, length)
    num_chunks = -(-length // chunk)
    wanted = mask > 0
    # Stable, so that equal keys keep their order and the permutation is the same on every platform.
    order = jnp.argsort(~wanted, axis=1, stable=True)
    counts = jnp.sum(wanted, axis=1)

    def chunked(x):  # [B, T, ...] -> [num_chunks, B, C, ...], wanted tokens first
        x = jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)
        x = jnp.pad(x, [(0, 0), (0, num_chunks * chunk - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], num_chunks, chunk, *x.shape[2:]), 1, 0)

    embedding = constrain(embedding, "vocab", "embed")  # gathered over fsdp once, not per chunk

    # Around the choice, not inside of it: a cond saves what its branches computed, [tokens, vocabulary] masks among it.
    # prevent_cse is for code outside of a scan, where common subexpressions could meet.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk_statistics(needed, hidden_chunk, target_chunk, embedding):
        zeros = jnp.zeros(target_chunk.shape, jnp.float32)
        nothing = dict.fromkeys(names, zeros)
        compute = functools.partial(_chunk_statistics, names=names)
        return jax.lax.cond(needed, compute, lambda *_: nothing, hidden_chunk, embedding, target_chunk)

    def all_chunks(needed, hidden_chunks, target_chunks, embedding):
        return jax.lax.scan(
            lambda _, inputs: (None, chunk_statistics(*inputs, embedding)), None, (needed, hidden_chunks, target_chunks)
        )[1]

    needed = jnp.arange(num_chunks) * chunk < jnp.max(counts)
    outputs = _rows_apart(all_chunks)(needed, chunked(hidden), chunked(targets), embedding)
    back = jnp.argsort(order, axis=1)

    def unchunked(x):  # [num_chunks, B, C] -> [B, T]
        x = jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :length]
        return jnp.where(wanted, jnp.take_along_axis(x, back, axis=1), 0.0)

    return jax.tree.map(unchunked, outputs)


def _rows_apart(all_chunks):
    """Each device takes its own rows, so that the embedding's gradient is summed over devices once, not every chunk.

    Only the rows' axes are taken out of the partitioner's hands: the vocabulary stays cut as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or batch_divisor(mesh) == 1:
        return all_chunks
    rows = PartitionSpec(None, BATCH_AXES)
    specs = (PartitionSpec(), rows, rows, PartitionSpec())
    return jax.shard_map(all_chunks, in_specs=specs, out_specs=rows, axis_names=set(BATCH_AXES), check_vma=False)


def _chunk_statistics(hidden, embedding, targets, names):
    """[B, C, D], [V, D], [B, C] -> {name: [B, C]}."""
    logits = contract_rows(hidden, embedding, jnp.float32)
    logits = constrain(logits, "batch", "length", "vocab")
    log_norm = jax.nn.logsumexp(logits, axis=-1)
    # Compare-and-sum instead of a gather: it stays local where the vocabulary is cut over devices.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    target_logit = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    found = {"logprobs": target_logit - log_norm}
    if "entropies" in names:
        mean_logit = jnp.sum(jnp.exp(logits - log_norm[..., None]) * logits, axis=-1)
        found["entropies"] = log_norm - mean_logit
    if "top1" in names:
        found["top1"] = (target_logit >= jnp.max(logits, axis=-1)).astype(jnp.float32)
    return {name: found[name] for name in names}
