"""Greedy responses are transformers' own, for every family and kind of rope, and so are their log-probs.

Prompts from one token to beyond several chunks and blocks, many sharing a beginning, through few slots.
"""

import random

import numpy as np
import pytest
import torch

from lm_jax.checkpoints.runs import open_model
from lm_jax.config import ComputeConfig, DecodeConfig, MeshConfig
from lm_jax.data.tokenizers import load_tokenizer
from lm_jax.generation.requests import Request, SamplingConfig
from lm_jax.generation.sampling import LocalGenerator
from lm_jax.models.forward import packed_logprobs
from lm_jax.sharding import make_mesh
from tests.checkpoints import make_checkpoint, make_tokenizer

NEW = 64
TOLERANCE = 1e-4  # nats
LETTERS = "bfgjklopqvxz"  # the tokenizer merges none of them: a letter is a token
LENGTHS = (1, 2, 31, 32, 33, 64, 97, 170)
BEGINNING, SHARING = 70, 34  # tokens, and prompts of up to 51 more: they go through three prefills


def rope(kind, **fields):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **fields}}


# A window of 24 is a ring of 64 places, which longer prompts go round while they are prefilled and others in decoding,
# so that nothing of a beginning that is shared may be taken for granted
SLIDING = {"use_sliding_window": True, "sliding_window": 24}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
CASES = {
    "llama": ("llama", {}),
    "llama-linear": ("llama", rope("linear", factor=4.0)),
    "llama-llama3": (
        "llama",
        rope("llama3", factor=8.0, original_max_position_embeddings=64, low_freq_factor=1.0, high_freq_factor=4.0),
    ),
    "llama-yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    # No multiple of a chunk, and a prompt whose padding would reach beyond it
    "llama-dynamic": ("llama", {**rope("dynamic", factor=2.0), "max_position_embeddings": 240}),
    "mistral": ("mistral", {}),
    "mistral-window": ("mistral", {"sliding_window": 24}),
    # One would do as well, but transformers' own cache keeps every token then
    "mistral-window-of-two": ("mistral", {"sliding_window": 2}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-max-window-layers": ("qwen2", {**SLIDING, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"num_key_value_heads": 1}),
    "qwen3-layer-types": ("qwen3", {**SLIDING, "num_hidden_layers": 3, "layer_types": LAYERS}),
}


def prompts_for(context):
    rng = random.Random(0)
    beginning = rng.choices(LETTERS, k=BEGINNING)
    texts = ["".join(rng.choices(LETTERS, k=length)) for length in (*LENGTHS, context - 10)[: 8 + (context < 256)]]
    sharing = ["".join([*beginning, *rng.choices(LETTERS, k=1 + 5 * i % 51)]) for i in range(SHARING)]
    return texts, texts + sharing


def padded(rows, size):
    return np.stack([np.pad(row, (0, size - len(row))) for row in rows]).astype(np.int32)


def picked(logprobs, prompts, responses):
    """The log-probs of responses, from those of every position's next token [B, T]."""
    return [
        row[len(prompt) - 1 : len(prompt) - 1 + len(ids)]
        for row, prompt, ids in zip(logprobs, prompts, responses, strict=True)
    ]


@pytest.mark.parametrize("name", CASES)
def test_greedy_equals_transformers(name, tmp_path):
    family, fields = CASES[name]
    fields = {"max_position_embeddings": 512, "eos_token_id": None, **fields}
    context = fields["max_position_embeddings"]
    model = make_checkpoint(tmp_path, family, **fields)
    make_tokenizer(tmp_path)
    source, mesh, tokenizer = open_model(str(tmp_path)), make_mesh(MeshConfig(1, 1, 1)), load_tokenizer(str(tmp_path))
    params = source.load_params(mesh, "float32")
    compute, decode = ComputeConfig("float32"), DecodeConfig(slots=12, max_length=512, chunk=16)
    generator = LocalGenerator(params, source.config, tokenizer, (), compute, decode, mesh)
    plain, texts = prompts_for(context)
    requests = [Request(str(i), text) for i, text in enumerate(texts)]
    done = {c.id: c for cs in generator.generate(requests, SamplingConfig(NEW, temperature=0.0)) for c in cs}
    samples = [done[r.id].samples[0] for r in requests]
    responses = [np.array(s.token_ids) for s in samples]
    prompts = [np.array(tokenizer(text)["input_ids"]) for text in texts]
    assert [len(p) for p in prompts] == [len(text) for text in texts]
    assert [len(r) for r in responses] == [min(NEW, context - len(p)) for p in prompts]

    nameless = list(range(len(tokenizer), source.config.vocab_size))  # rows of the embedding without a token
    assert nameless
    for prompt, response in zip(prompts[: len(plain)], responses, strict=False):
        with torch.no_grad():
            out = model.generate(
                torch.tensor(prompt)[None],
                max_new_tokens=len(response),
                do_sample=False,
                pad_token_id=0,
                suppress_tokens=nameless,
            )
        np.testing.assert_array_equal(response, out[0, len(prompt) :].numpy(), err_msg=f"prompt of {len(prompt)}")

    # Every row: each token is the likeliest given all before it, in one forward pass over everything
    whole = [np.concatenate(pair) for pair in zip(prompts, responses, strict=True)]
    tokens = padded(whole, max(map(len, whole)))
    with torch.no_grad():
        theirs = torch.log_softmax(model(torch.tensor(tokens, dtype=torch.long)).logits, dim=-1).numpy()
    targets = np.roll(tokens, -1, axis=1)
    of_targets = np.take_along_axis(theirs, targets[..., None], axis=-1)[..., 0]
    ours = [np.array(s.logprobs) for s in samples]
    assert np.isin(theirs.argmax(-1), nameless).any(), "none would have been drawn"
    theirs[..., nameless] = -np.inf
    for got, expected, best in zip(
        ours, picked(of_targets, prompts, responses), picked(theirs.max(-1), prompts, responses), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(expected, best, rtol=0, atol=TOLERANCE)

    lengths = np.array([len(row) for row in whole])[:, None]
    at = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    batch = {
        "tokens": tokens,
        "positions": np.minimum(at, lengths - 1),
        "segment_ids": (at < lengths).astype(np.int32),
        "targets": targets,
        "loss_mask": (at < lengths - 1).astype(np.float32),
    }
    packed = packed_logprobs(params, batch, source.config, compute)
    for got, expected in zip(ours, picked(np.asarray(packed), prompts, responses), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)
