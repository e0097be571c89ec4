"""Chunked log-probs and entropies against torch on whole logits, their gradients, and the memory they take."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lm_jax.models import logprobs as head
from lm_jax.models.logprobs import token_logprobs, token_statistics

B, T, D, V = 3, 11, 8, 29
MASKS = {
    "all": np.ones((B, T)),
    "ragged": np.array([[0] * 3 + [1] * 8, [1, 0] * 5 + [1], [0] * 10 + [1]]),
    "empty-row": np.array([[1] * 11, [0] * 11, [0, 1] * 5 + [0]]),
    "none": np.zeros((B, T)),
}
CHUNKS = [1, 4, 11, 256]  # of 33 tokens; 4 does not divide them
BLOCKS = [29, 8, 1]  # words at one time; 8 does not divide the vocabulary


@functools.cache
def inputs():
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((B, T, D)).astype(np.float32)
    embedding = rng.standard_normal((V, D)).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    return hidden, embedding, targets, rng.standard_normal((2, B, T)).astype(np.float32)


@pytest.fixture(params=BLOCKS[:1])
def block(request, monkeypatch):
    monkeypatch.setattr(head, "BLOCK", request.param)
    return request.param


@functools.partial(jax.jit, static_argnames=("chunk", "block"))
def ours(hidden, embedding, targets, mask, cotangents, chunk, block=None):
    """[log-probs, entropies, d hidden, d embedding]; `block` keeps compiled ones apart."""
    fn = functools.partial(token_logprobs, targets=targets, mask=mask, chunk=chunk)
    outputs, pull_back = jax.vjp(fn, hidden, embedding)
    return [*outputs, *pull_back(tuple(cotangents))]


def theirs(hidden, embedding, targets, mask, cotangents):
    hidden, embedding = torch.tensor(hidden, requires_grad=True), torch.tensor(embedding, requires_grad=True)
    log_probs = torch.log_softmax(hidden @ embedding.T, dim=-1)
    mask = torch.tensor(mask, dtype=torch.float32)
    picked = log_probs.gather(-1, torch.tensor(targets, dtype=torch.long)[..., None])[..., 0] * mask
    entropy = -(log_probs.exp() * log_probs).sum(-1) * mask
    (torch.tensor(cotangents[0]) * picked + torch.tensor(cotangents[1]) * entropy).sum().backward()
    return [x.numpy() for x in (picked.detach(), entropy.detach(), hidden.grad, embedding.grad)]


@pytest.mark.parametrize("block", BLOCKS, indirect=True)
@pytest.mark.parametrize("padding", [1, 3, 19])
def test_rows_of_padding_count_for_nothing(padding, block):
    """Though their logits would be the largest, and fill whole blocks."""
    hidden, embedding, targets, cotangents = inputs()
    padded = np.concatenate([embedding, np.full((padding, D), 9.0, np.float32) * np.sign(hidden[0, -1])])
    names = ("logprobs", "entropies", "top1")

    def statistics(hidden, embedding):
        found = token_statistics(hidden, embedding, targets, MASKS["ragged"], 4, names, V)
        return (found["logprobs"], found["entropies"]), found["top1"]

    outputs, pull_back, top1 = jax.vjp(statistics, hidden, padded, has_aux=True)
    d_hidden, d_embedding = pull_back(tuple(cotangents))
    for found, expected in zip(
        [*outputs, d_hidden, d_embedding[:V]],
        theirs(hidden, embedding, targets, MASKS["ragged"], cotangents),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert not np.asarray(d_embedding[V:]).any()
    likeliest = (hidden @ embedding.T).argmax(-1) == targets
    np.testing.assert_array_equal(top1, likeliest * MASKS["ragged"])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("chunk", "block"), [*((c, BLOCKS[0]) for c in CHUNKS), (4, 8), (11, 1)], indirect=["block"])
def test_equals_torch(mask, chunk, block):
    hidden, embedding, targets, cotangents = inputs()
    mask = MASKS[mask]
    expected = theirs(hidden, embedding, targets, mask, cotangents)
    got = ours(hidden, embedding, targets, mask, cotangents, chunk, block)
    for what, a, b in zip(("log-probs", "entropies", "d hidden", "d embedding"), got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=what)
    for what, a in zip(("log-probs", "entropies", "d hidden"), got, strict=False):
        assert not np.asarray(a)[mask == 0].any(), f"{what} outside the mask"


def test_without_entropy():
    """The same log-probs to the bit and the same gradients, and no entropies."""
    hidden, embedding, targets, cotangents = inputs()
    fn = functools.partial(token_logprobs, targets=targets, mask=MASKS["ragged"], chunk=4)
    expected, _ = fn(hidden, embedding)
    got, entropies = fn(hidden, embedding, with_entropy=False)
    assert entropies is None
    np.testing.assert_array_equal(got, expected)
    cotangents = np.stack([cotangents[0], np.zeros((B, T), np.float32)])
    _, _, *grads = theirs(hidden, embedding, targets, MASKS["ragged"], cotangents)
    _, pull_back = jax.vjp(lambda h, e: fn(h, e, with_entropy=False)[0], hidden, embedding)
    for a, b in zip(pull_back(cotangents[0]), grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("chunk", "block"), [(4, 29), (11, 8)], indirect=["block"])
def test_top1(chunk, block):
    """1 where the target is torch's argmax, 0 elsewhere and outside the mask; the log-probs beside it are the same."""
    hidden, embedding, targets, _ = inputs()
    best = torch.argmax(torch.tensor(hidden) @ torch.tensor(embedding).T, -1).numpy()
    targets = np.where(np.arange(T) % 3 == 0, targets, best).astype(np.int32)
    found = token_statistics(hidden, embedding, targets, MASKS["ragged"], chunk, ("top1", "logprobs"))
    np.testing.assert_array_equal(found["top1"], (targets == best) * MASKS["ragged"])
    assert 0 < found["top1"].sum() < MASKS["ragged"].sum()
    expected, _ = token_logprobs(hidden, embedding, targets, MASKS["ragged"], chunk, with_entropy=False)
    np.testing.assert_allclose(found["logprobs"], expected, rtol=1e-6)


def test_masked_out_targets_are_not_read():
    """Padding has whatever target; ids out of range there change nothing."""
    hidden, embedding, targets, cotangents = inputs()
    wild = np.where(MASKS["ragged"] > 0, targets, -7)
    for a, b in zip(
        ours(hidden, embedding, targets, MASKS["ragged"], cotangents, 4),
        ours(hidden, embedding, wild, MASKS["ragged"], cotangents, 4),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("block", BLOCKS[:2], indirect=True)
def test_large_logits(block):
    """No overflow at logits in the hundreds, where exp alone would be infinite, and the largest may come late."""
    hidden, embedding, targets, _ = inputs()
    logprobs, entropies = token_logprobs(200 * hidden, embedding, targets, np.ones((B, T)), 4)
    log_probs = torch.log_softmax(torch.tensor(200 * hidden).double() @ torch.tensor(embedding).double().T, dim=-1)
    expected = log_probs.gather(-1, torch.tensor(targets, dtype=torch.long)[..., None])[..., 0]
    np.testing.assert_allclose(logprobs, expected, rtol=1e-6, atol=1e-3)
    np.testing.assert_allclose(entropies, -(log_probs.exp() * log_probs).sum(-1), atol=1e-3)


def test_bfloat16_gives_float32():
    """bf16 hidden states: products of bf16 numbers summed, normalised and returned in fp32."""
    hidden, embedding, targets, cotangents = inputs()
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (hidden, embedding)]
    got = ours(jnp.asarray(hidden, jnp.bfloat16), embedding, targets, MASKS["all"], cotangents, 4)
    expected = theirs(*rounded, targets, MASKS["all"], cotangents)
    assert got[0].dtype == got[1].dtype == jnp.float32
    for a, b in zip(got[:2], expected[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(got[2:], expected[2:], strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2e-2, atol=1e-2 * np.abs(b).max())


def test_a_frozen_embedding_costs_no_gradient():
    """No product with its shape is in the program, where only the hidden states are differentiated."""
    hidden, embedding, targets, _ = map(jnp.asarray, inputs())

    def loss(hidden, embedding):
        return jnp.sum(token_logprobs(hidden, embedding, targets, MASKS["all"], 4, with_entropy=False)[0])

    def products(argnums):
        return str(jax.make_jaxpr(jax.grad(loss, argnums))(hidden, embedding)).count("dot_general")

    assert products(0) == products((0, 1)) - 1 == 3  # logits, once more for the gradient, d hidden


def temporary_bytes(length, chunk, vocab, width=16, rows=1, dtype=jnp.float32):
    """Peak temporary memory of the compiled gradient of the sum of the log-probs and entropies of `rows` rows."""
    struct = jax.ShapeDtypeStruct

    def loss(hidden, embedding, targets, mask):
        return sum(map(jnp.sum, token_logprobs(hidden, embedding, targets, mask, chunk)))

    compiled = (
        jax.jit(jax.grad(loss, argnums=(0, 1)))
        .lower(
            struct((rows, length, width), dtype),
            struct((vocab, width), jnp.float32),
            struct((rows, length), jnp.int32),
            struct((rows, length), jnp.float32),
        )
        .compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_memory_is_one_tile(dtype):
    """At the vocabulary of Qwen2.5 and 8,192 tokens far below 300 MB, and the same for other ways to lay them out.

    Twice the tokens cost copies of [N, D] and of numbers a token, whose logits would be 608 KB each.
    """
    vocab, width, chunk = 152_064, 16, 256
    found = temporary_bytes(2048, chunk, vocab, rows=4, dtype=dtype)
    tile = chunk * head.BLOCK * 4
    assert found < 4 * tile < 300e6
    assert temporary_bytes(8192, chunk, vocab, dtype=dtype) == pytest.approx(found, rel=0.05)
    per_token = (temporary_bytes(16_384, chunk, vocab, dtype=dtype) - found) / 8192
    assert per_token < 10 * width * 4 + 100, f"{per_token} bytes a token"
    assert temporary_bytes(2048, 8192, vocab, rows=4, dtype=dtype) > 4 * found, "a large tile would show"
