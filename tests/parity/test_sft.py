"""Supervised training is TRL's and transformers', gradients included; and how rows are laid out changes nothing."""

import functools

import jax
import numpy as np
import optax
import pytest
import torch
import transformers

from lm_jax.checkpoints.hf import load_params
from lm_jax.config import ComputeConfig, MeshConfig
from lm_jax.data.batches import BatchIterator
from lm_jax.data.packing import Segment, example_lengths, fill_rows, pack
from lm_jax.data.plans import plan_steps
from lm_jax.data.supervised import load_supervised
from lm_jax.data.text import TextEncoder
from lm_jax.data.tokenizers import load_tokenizer
from lm_jax.models.registry import read_model_config, weight_table
from lm_jax.models.weights import flatten
from lm_jax.sharding import make_mesh
from lm_jax.training.step import TrainState, make_train_step
from lm_jax.training.supervised import VALUES, supervised_objective
from main_jax.training.losses import mixed_coefficients
from tests.checkpoints import CHATML, make_checkpoint, make_tokenizer
from tests.e2e.common import write_rows
from tests.trl_oracle import sft_oracle

RTOL = 1e-4
ROW_LENGTH, ROWS = 96, 6
PROMPTS = [
    {"prompt": "what is this?\n", "response": "the hat and the cat"},
    {"prompt": "cat\n", "response": "the cat is what this hat is, and that is that"},
    {"prompt": "name the user:\n", "response": "Zoë, 7"},
    {"prompt": "x\n", "response": "z"},
]
WORDS = [
    ["what is this", "the cat", "and that", "the hat, and that is that"],
    ["is it", "what?"],
    ["the user", "the assistant", "say it", "it", "more", "and it is"],
]
CONVERSATIONS = [
    {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(words)]}
    for words in WORDS
]
# Nothing after the end token, which TRL would learn; the markers are for its mask alone
TEMPLATE = CHATML.replace("<|im_end|>\n", "<|im_end|>").replace(
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}",
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    model = make_checkpoint(path, "llama", vocab_size=304, attention_bias=True)
    tokenizer = make_tokenizer(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    # A few steps, so that some tokens are the likeliest and an accuracy is there to compare
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    texts = [r["prompt"] + r["response"] for r in PROMPTS] + [" ".join(words) for words in WORDS]
    for ids in [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts] * 3:
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def config(model):
    return read_model_config(model)


@pytest.fixture(scope="module")
def params(model, config):
    return load_params(model, config, None)


@pytest.fixture(scope="module")
def segments_of(model, tmp_path_factory):
    def read(rows, **options):
        path = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)
        return load_supervised(path, TextEncoder(load_tokenizer(model), ROW_LENGTH), **options).segments

    return read


@functools.cache
def gradient_fn(config, chunk, mixed):
    coefficients = {"coefficients": mixed_coefficients} if mixed else {}
    objective = supervised_objective(
        config, ComputeConfig("float32", attention="reference", logprob_chunk=chunk), **coefficients
    )

    @jax.jit
    def fn(params, batch, alpha):
        totals = objective.count(batch) | {"alpha": alpha}

        def of(params):
            total, metrics, bad = objective.loss(params, batch, totals)
            return total, {**metrics, "bad": bad}

        return jax.value_and_grad(of, has_aux=True)(params)

    return fn


def loss_and_gradients(params, config, segments, rows, chunk=16, alpha=None):
    """(loss, metrics, {path: gradient}) of segments laid out in `rows`; always ROWS rows: one shape to compile."""
    rows = [list(row) for row in rows] + [[]] * (ROWS - len(rows))
    batch = fill_rows(rows, [(s,) for s in segments], ROW_LENGTH, 4, VALUES)
    (total, metrics), grads = gradient_fn(config, chunk, alpha is not None)(params, batch, alpha or 0.0)
    assert metrics.pop("bad") == -1
    return float(total), metrics, flatten(grads)


def packed_rows(segments):
    rows = pack(example_lengths([(s,) for s in segments]), ROW_LENGTH)
    assert len(rows) < len(segments), "nothing is packed"
    return rows


def learnt(segment):
    """The ids that are learnt."""
    return segment.response[... if segment.loss_mask is None else segment.loss_mask].tolist()


def check_gradients(grads, expected, config):
    """Relative to each array's largest entry."""
    for spec in weight_table(config):
        layers = grads[spec.path] if spec.stacked else grads[spec.path][None]
        for name, layer in zip(spec.hf_names(config), layers, strict=True):
            theirs = expected[name]
            scale = np.abs(theirs).max()
            assert scale > 0, name
            ours = np.asarray(spec.to_hf(layer, config))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=RTOL * scale, err_msg=name)


@pytest.mark.parametrize("kind", ["strings", "conversations"])
def test_equals_trl(kind, model, config, params, segments_of):
    if kind == "strings":
        segments = segments_of(PROMPTS)
        theirs = sft_oracle(model, [{"prompt": r["prompt"], "completion": r["response"]} for r in PROMPTS])
    else:
        segments = segments_of(CONVERSATIONS)
        theirs = sft_oracle(model, CONVERSATIONS, assistant_only_loss=True)
        assert any(s.loss_mask is not None and not s.loss_mask.all() for s in segments)
    assert [learnt(s) for s in segments] == theirs["labels"]
    loss, metrics, grads = loss_and_gradients(params, config, segments, packed_rows(segments))
    np.testing.assert_allclose(loss, theirs["loss"], rtol=RTOL)
    np.testing.assert_allclose(metrics["mean_token_accuracy"], theirs["mean_token_accuracy"], rtol=1e-6)
    assert 0 < metrics["mean_token_accuracy"] < 1
    check_gradients(grads, theirs["grads"], config)


def test_steps_of_three_rows_equal_trls(model, config, params, segments_of):
    """Each step's loss, accuracy and gradient are TRL's for the very rows that it holds."""
    rng = np.random.default_rng(0)
    words = "what is this hat that the cat says to a user of the system".split()

    def text(most):
        return " ".join(rng.choice(words, rng.integers(1, most)))

    rows = [{"prompt": text(4) + "\n", "response": text(12)} for _ in range(8)]
    examples = [(s,) for s in segments_of(rows)]
    lengths = example_lengths(examples)
    plan = plan_steps(lengths, 3, 1, seed=0, rows=1, row_length=int(lengths.max()))
    assert len(plan) == 3 and sum(stack.microbatches for stack in plan.shapes[0]) > 1
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    objective = supervised_objective(config, ComputeConfig("float32", attention="reference", logprob_chunk=16))
    keep = optax.chain(optax.trace(0.0), optax.scale(0.0))  # the gradient in its state, and nothing learnt
    step = jax.jit(make_train_step(objective, keep, lambda step: 0.0))
    state = TrainState.create(params, keep)
    for number, batch in enumerate(BatchIterator(plan, examples, mesh, VALUES)):
        held = plan.examples(number)
        assert len(held) == (3, 3, 2)[number]
        state, metrics = step(state, batch)
        given = [{"prompt": rows[i]["prompt"], "completion": rows[i]["response"]} for i in held]
        theirs = sft_oracle(model, given)
        np.testing.assert_allclose(metrics["loss"], theirs["loss"], rtol=RTOL)
        np.testing.assert_allclose(metrics["mean_token_accuracy"], theirs["mean_token_accuracy"], rtol=1e-6)
        check_gradients(flatten(state.opt_state[0].trace), theirs["grads"], config)


def weighted(segments):
    """The segments with a weight and a source each."""
    weights, synthetic = [0.5, 3.0, 1.0, 2.0], [1, 0, 1, 0]
    return [
        Segment(s.prompt, s.response, {k: np.full(len(s.response), v) for k, v in (("weights", w), ("synthetic", y))},
                s.loss_mask)
        for s, w, y in zip(segments, weights, synthetic, strict=False)
    ]  # fmt: skip


def test_weights_and_alpha_equal_torch(model, config, params, segments_of):
    """transformers' logits, row by row, and torch's cross-entropy in the formula as it is written."""
    segments = weighted(segments_of(CONVERSATIONS))
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sums = {0.0: [0, 0], 1.0: [0, 0]}
    for s in segments:
        ids = torch.tensor([*s.prompt.tolist(), *s.response.tolist()])
        labels = torch.tensor([-100] * len(s.prompt) + learnt_or_ignored(s))
        nll = torch.nn.functional.cross_entropy(torch_model(ids[None]).logits[0, :-1], labels[1:], reduction="sum")
        weight, side = s.values["weights"][0], sums[s.values["synthetic"][0]]
        side[0] += weight * nll
        side[1] += weight * len(learnt(s))
    seed, synthetic = (total / weight for total, weight in (sums[0.0], sums[1.0]))
    expected = 0.3 * synthetic + 0.7 * seed
    expected.backward()
    loss, metrics, grads = loss_and_gradients(params, config, segments, packed_rows(segments), alpha=0.3)
    np.testing.assert_allclose(loss, expected.item(), rtol=RTOL)
    np.testing.assert_allclose(metrics["loss/seed"], seed.item(), rtol=RTOL)
    np.testing.assert_allclose(metrics["loss/synthetic"], synthetic.item(), rtol=RTOL)
    check_gradients(grads, {name: p.grad.numpy() for name, p in torch_model.named_parameters()}, config)


def learnt_or_ignored(segment):
    mask = np.ones(len(segment.response), bool) if segment.loss_mask is None else segment.loss_mask
    return np.where(mask, segment.response, -100).tolist()


def test_layouts_and_chunks_give_the_same_loss_and_gradients(config, params, segments_of):
    segments = weighted(segments_of(CONVERSATIONS))
    loss, metrics, expected = loss_and_gradients(params, config, segments, packed_rows(segments))
    padded = [[i] for i in range(len(segments))]
    alone = [loss_and_gradients(params, config, segments, [row]) for row in padded]
    shares = np.array([s.values["weights"][0] * len(learnt(s)) for s in segments])
    shares /= shares.sum()
    found = {
        "padded": loss_and_gradients(params, config, segments, padded)[::2],
        "one at a time": (
            sum(share * one for share, (one, _, _) in zip(shares, alone, strict=True)),
            {p: sum(w * g[p] for w, (_, _, g) in zip(shares, alone, strict=True)) for p in expected},
        ),
        "one chunk": loss_and_gradients(params, config, segments, packed_rows(segments), chunk=ROW_LENGTH)[::2],
    }
    largest = max(np.abs(g).max() for g in expected.values())
    for name, (other, grads) in found.items():
        np.testing.assert_allclose(other, loss, rtol=1e-5, err_msg=name)
        for path, gradient in expected.items():
            np.testing.assert_allclose(grads[path], gradient, rtol=0, atol=1e-5 * largest, err_msg=f"{name} {path}")
