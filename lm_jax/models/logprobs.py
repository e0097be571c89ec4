"""Hidden states -> log-prob of the target token and entropy, without ever holding [tokens, vocabulary].

The work goes by blocks of the vocabulary, and within one by chunks of tokens. The softmax is normalised on the fly, and
the gradient is written out: forward keeps each token's log-normaliser and nothing else of its logits, backward makes a
tile's logits once more and turns them into their gradient in one pass (as FlashAttention does with its scores, arXiv
2205.14135, appendix B). With blocks outside, a block of the embedding is gathered, and its gradient finished and
reduced, at one time: where `fsdp` cuts the embedding, neither it nor its gradient is ever whole on a device.

Axes: B rows, T tokens, N = B T tokens of a device, C tokens of a chunk, D model, V vocabulary, W words of a block.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from lm_jax.sharding import BATCH_AXES

BLOCK = 8192  # words of the vocabulary whose logits exist at one time
_NOWHERE = -1e30  # a logit without weight, finite so that 0 times it is 0


def token_logprobs(
    hidden: jax.Array, embedding: jax.Array, targets: jax.Array, mask: jax.Array, chunk: int, with_entropy: bool = True
) -> tuple[jax.Array, jax.Array | None]:
    """(log-probs [B, T], entropies [B, T] or None): `token_statistics` where nothing else is wanted."""
    names = ("logprobs", "entropies") if with_entropy else ("logprobs",)
    found = token_statistics(hidden, embedding, targets, mask, chunk, names)
    return found["logprobs"], found.get("entropies")


def without_padding(logits: jax.Array, vocab_size: int) -> jax.Array:
    """Logits [..., V], fp32, whose words are the first `vocab_size`: the others get no probability."""
    words = jnp.arange(logits.shape[-1])
    return logits if len(words) == vocab_size else jnp.where(words < vocab_size, logits, _NOWHERE)


def token_statistics(
    hidden: jax.Array,
    embedding: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    chunk: int,
    names: tuple[str, ...],
    vocab_size: int | None = None,
) -> dict[str, jax.Array]:
    """What is asked for of each target and the distribution it comes from, fp32.

    A device holds chunk * BLOCK logits at one time, however many tokens and words there are. Only masked-in tokens are
    worked on: each device moves those of all its rows to the front and stops after the last chunk that has one.

    Args:
      hidden: [B, T, D] after the final norm.
      embedding: [V, D], the output embedding. Its gradient adds up in its own dtype.
      targets: [B, T] int32, the token that follows.
      mask: [B, T], nonzero where a result is wanted.
      chunk: tokens of a device that are worked on at one time.
      names: among `logprobs` of the targets and `entropies` of the distributions, in nats, and `top1`: 1 where the
        target is the likeliest token, else 0; no gradient goes through it. Training has no use for entropies, and
        their gradient costs work on the logits.
      vocab_size: rows of the embedding that are words; those behind them are padding, without probability or gradient.
        None: all.

    Returns:
      {name: [B, T]}, zero where the mask is zero.
    """
    return _statistics(hidden, embedding, targets, mask > 0, chunk, names, vocab_size or len(embedding))


@functools.partial(jax.custom_vjp, nondiff_argnames=("chunk", "names", "vocab_size"))
def _statistics(hidden, embedding, targets, wanted, chunk, names, vocab_size):
    return _forward_on_mesh((hidden, embedding, targets, wanted), chunk, names, vocab_size)[0]


def _forward(hidden, embedding, targets, wanted, chunk, names, vocab_size):
    arrays = tuple(x.value for x in (hidden, embedding, targets, wanted))
    out, kept = _forward_on_mesh(arrays, chunk, names, vocab_size)
    return out, (arrays, kept, () if embedding.perturbed else None)


def _forward_on_mesh(arrays, chunk, names, vocab_size):
    local = functools.partial(_local_forward, chunk=chunk, names=names, vocab_size=vocab_size)
    return _on_mesh(local, ("rows", "rows"), *arrays)


def _backward(chunk, names, vocab_size, residuals, grads):
    arrays, kept, trained = residuals
    grads = {k: jnp.zeros(g.shape) if isinstance(g, SymbolicZero) else g for k, g in grads.items() if k != "top1"}
    results = ("rows", "embedding") if trained is not None else ("rows",)  # frozen weights get no gradient
    local = functools.partial(_local_backward, chunk=chunk, results=results, vocab_size=vocab_size)
    found = _on_mesh(local, results, *arrays, kept, grads)
    return found[0], found[1] if trained is not None else None, None, None


_statistics.defvjp(_forward, _backward, symbolic_zeros=True)


def _on_mesh(local, results, *arrays):
    """Runs `local` on each device's rows and its part of the embedding; `results`: which of both each result is like.

    What is exchanged, and when, is written in `local`: the partitioner would exchange the gradient every chunk.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(*arrays, exchange=_Nobody())
    specs = {"rows": PartitionSpec(BATCH_AXES), "embedding": PartitionSpec("tensor", "fsdp")}
    inputs = ("rows", "embedding", *["rows"] * (len(arrays) - 2))
    in_specs, out_specs = (tuple(specs[like] for like in names) for names in (inputs, results))
    local = functools.partial(local, exchange=_Exchange())
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)


class _Exchange:
    """Between devices that hold other rows (data, fsdp), other columns (fsdp) or other words (tensor)."""

    def first_word(self, num_words: int) -> jax.Array:
        return jax.lax.axis_index("tensor") * num_words

    def over_words(self, reduce, x: jax.Array) -> jax.Array:
        return reduce(x, "tensor")

    def whole_columns(self, block: jax.Array) -> jax.Array:  # [W, D / fsdp] -> [W, D]
        return jax.lax.all_gather(block, "fsdp", axis=1, tiled=True)

    def own_columns(self, d_block: jax.Array) -> jax.Array:  # [W, D] -> [W, D / fsdp], summed over rows
        return jax.lax.psum_scatter(d_block, "fsdp", scatter_dimension=1, tiled=True)

    def over_replicas(self, d_embedding: jax.Array) -> jax.Array:
        return jax.lax.psum(d_embedding, "data")


class _Nobody(_Exchange):
    def first_word(self, num_words):
        return jnp.int32(0)

    def over_words(self, reduce, x):
        return x

    def whole_columns(self, block):
        return block

    def own_columns(self, d_block):
        return d_block

    def over_replicas(self, d_embedding):
        return d_embedding


class _Front:
    """The wanted tokens of one device's rows, moved to the front and cut into chunks."""

    def __init__(self, wanted: jax.Array, chunk: int):
        self.wanted, self.chunk = wanted, min(chunk, wanted.size)
        flat = wanted.reshape(-1)
        # Stable, so that equal keys keep their order and the permutation is the same on every platform.
        order = jnp.argsort(~flat, stable=True)
        self.order = jnp.pad(order, (0, -flat.size % self.chunk)).reshape(-1, self.chunk)
        self.place = (jnp.cumsum(flat) - 1).reshape(wanted.shape)
        number = jnp.arange(self.order.size).reshape(self.order.shape)
        self.filled = number < jnp.sum(flat)  # [chunks, C]

    def chunks(self, x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [chunks, C, ...], wanted tokens first."""
        return x.reshape(-1, *x.shape[2:])[self.order]

    def rows(self, x: jax.Array) -> jax.Array:
        """[chunks, C, ...] -> [B, T, ...], zero where nothing is wanted."""
        wanted = self.wanted.reshape(self.wanted.shape + (1,) * (x.ndim - 2))
        return jnp.where(wanted, x.reshape(-1, *x.shape[2:])[self.place], jnp.zeros((), x.dtype))


def _over_blocks(body, carry, embedding, dtype, vocab_size, exchange):
    """`body`(carry, first row, block [W, D], ids [W] of its words) -> carry, for each block of the embedding.

    Blocks are of one size: the last one begins early, and words that have had their turn have the id -1 there, as rows
    of padding have.
    """
    num_words = embedding.shape[0]
    width = min(BLOCK, num_words)

    def step(carry, number):
        row = jnp.minimum(number * width, num_words - width)
        block = exchange.whole_columns(jax.lax.dynamic_slice_in_dim(embedding, row, width).astype(dtype))
        words = row + jnp.arange(width)
        ids = exchange.first_word(num_words) + words
        ids = jnp.where((words < number * width) | (ids >= vocab_size), -1, ids)
        return body(carry, row, block, ids), None

    return jax.lax.scan(step, carry, jnp.arange(-(-num_words // width)))[0]


def _logits(tokens, block, ids):
    """[C, D], [W, D], [W] -> [C, W] fp32."""
    return jnp.where(ids < 0, _NOWHERE, _dot(tokens, block, 1, 1, jnp.float32))


def _dot(a, b, axis_a, axis_b, dtype):
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=dtype)


def _local_forward(hidden, embedding, targets, wanted, *, chunk, names, vocab_size, exchange):
    """One device's [B, T, D], [V, D], [B, T], [B, T] -> {name: [B, T]}, {what backward reads of each token: [B, T]}."""
    front = _Front(wanted, chunk)
    tokens, targets = front.chunks(hidden), front.chunks(targets)

    def tile(sums, tokens, targets, block, ids):
        logits = _logits(tokens, block, ids)
        top = jnp.maximum(sums["top"], jnp.max(logits, axis=-1))
        weights = jnp.exp(logits - top[:, None])
        # Compare-and-sum instead of a gather: it is one more term of a pass over the logits.
        target = jnp.sum(jnp.where(ids == targets[:, None], logits, 0.0), axis=-1)
        new = _shifted(sums, top) | {"target": sums["target"] + target}
        new["total"] += jnp.sum(weights, axis=-1)
        if "entropies" in names:
            new["weighted"] += jnp.sum(weights * (logits - top[:, None]), axis=-1)
        return new

    def block_of_words(sums, _, block, ids):
        def one(inputs):
            needed, *rest = inputs
            return jax.lax.cond(needed, tile, lambda sums, *_: sums, *rest, block, ids)

        return jax.lax.map(one, (front.filled[:, 0], sums, tokens, targets))

    zeros = jnp.zeros(front.order.shape, jnp.float32)
    sums = {"top": zeros + _NOWHERE, "total": zeros, "target": zeros}
    if "entropies" in names:
        sums["weighted"] = zeros
    sums = _over_blocks(block_of_words, sums, embedding, hidden.dtype, vocab_size, exchange)
    sums = _shifted(sums, exchange.over_words(jax.lax.pmax, sums["top"]))
    top = sums.pop("top")
    sums = {name: exchange.over_words(jax.lax.psum, x) for name, x in sums.items()}
    log_total = jnp.log(sums["total"])
    found = {"logprobs": sums["target"] - top - log_total}
    kept = {"log_norm": top + log_total}
    if "entropies" in names:
        # Relative to the largest logit: of a token that is all but certain little else would be left
        mean = sums["weighted"] / sums["total"]
        found["entropies"] = log_total - mean
        kept["mean_logit"] = top + mean
    if "top1" in names:
        found["top1"] = (sums["target"] >= top).astype(jnp.float32)
    return {name: front.rows(found[name]) for name in names}, {k: front.rows(x) for k, x in kept.items()}


def _shifted(sums, top):
    """The sums of exp(logit - top), and of it times (logit - top), with another top."""
    moved = sums["top"] - top
    new = sums | {"top": top, "total": sums["total"] * jnp.exp(moved)}
    if "weighted" in sums:
        new["weighted"] = (sums["weighted"] + sums["total"] * moved) * jnp.exp(moved)
    return new


def _local_backward(hidden, embedding, targets, wanted, kept, grads, *, chunk, results, vocab_size, exchange):
    """One device's d hidden [B, T, D] and, where `results` has it, d embedding [V, D]."""
    front = _Front(wanted, chunk)
    tokens, targets = front.chunks(hidden), front.chunks(targets)
    # With an infinite normaliser and no gradient, what fills up the last chunk counts for nothing.
    of_token = {k: jnp.where(front.filled, front.chunks(x), 0.0) for k, x in (kept | grads).items()}
    of_token["log_norm"] = jnp.where(front.filled, of_token["log_norm"], jnp.inf)

    def tile(d_tokens, d_block, tokens, targets, of_token, block, ids):
        known = {k: x[:, None] for k, x in of_token.items()}
        logits = _logits(tokens, block, ids)
        pull = known.get("logprobs", 0.0)
        at_target = jnp.where(ids == targets[:, None], pull, 0.0)
        if "entropies" in known:
            pull += known["entropies"] * (logits - known["mean_logit"])
        d_logits = (at_target - jnp.exp(logits - known["log_norm"]) * pull).astype(tokens.dtype)
        d_tokens += _dot(d_logits, block, 1, 0, jnp.float32)
        return d_tokens, None if d_block is None else d_block + _dot(d_logits, tokens, 0, 0, d_block.dtype)

    def block_of_words(carry, row, block, ids):
        def one(carry, inputs):
            d_tokens, d_block = carry
            number, needed, *rest = inputs
            given = (d_tokens[number], d_block, *rest, block, ids)
            here, d_block = jax.lax.cond(needed, tile, lambda d_tokens, d_block, *_: (d_tokens, d_block), *given)
            return (d_tokens.at[number].set(here), d_block), None

        d_tokens, d_embedding = carry
        d_block = None if d_embedding is None else jnp.zeros(block.shape, embedding.dtype)
        numbered = (jnp.arange(front.order.shape[0]), front.filled[:, 0], tokens, targets, of_token)
        (d_tokens, d_block), _ = jax.lax.scan(one, (d_tokens, d_block), numbered)
        if d_block is None:
            return d_tokens, None
        d_block = exchange.own_columns(d_block) + jax.lax.dynamic_slice_in_dim(d_embedding, row, d_block.shape[0])
        return d_tokens, jax.lax.dynamic_update_slice_in_dim(d_embedding, d_block, row, 0)

    start = jnp.zeros(tokens.shape, jnp.float32), jnp.zeros_like(embedding) if "embedding" in results else None
    d_tokens, d_embedding = _over_blocks(block_of_words, start, embedding, hidden.dtype, vocab_size, exchange)
    d_hidden = exchange.over_words(jax.lax.psum, front.rows(d_tokens)).astype(hidden.dtype)
    return (d_hidden,) if d_embedding is None else (d_hidden, exchange.over_replicas(d_embedding))
