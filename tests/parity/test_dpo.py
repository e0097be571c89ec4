"""Token-aware DPO with all weights 1 is TRL's DPO, gradients included; and how rows are laid out changes nothing."""

import functools
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm_jax.checkpoints.hf import load_params
from lm_jax.config import BatchConfig, ComputeConfig, MeshConfig
from lm_jax.data.batches import BatchIterator
from lm_jax.data.packing import Segment, example_lengths, fill_rows, pack
from lm_jax.data.plans import plan_steps
from lm_jax.data.text import TextEncoder, checked
from lm_jax.data.tokenizers import load_tokenizer
from lm_jax.models.decoder import REMAT_POLICIES
from lm_jax.models.registry import read_model_config, weight_table
from lm_jax.models.weights import flatten
from lm_jax.scoring.scoring import score
from lm_jax.sharding import make_mesh
from lm_jax.training.step import TrainState, make_train_step
from musc_jax.training.losses import LossConfig
from musc_jax.training.objective import preference_objective
from tests.checkpoints import make_checkpoint, make_tokenizer
from tests.trl_oracle import dpo_oracle

RTOL = 1e-4
BETA = 0.3
COMPUTE = ComputeConfig("float32", logprob_chunk=16)
ROW_LENGTH, MAX_PAIRS = 96, 5
PAIRS = [
    {"prompt": "what is this?\n", "chosen": "the hat and the cat", "rejected": "that"},
    {"prompt": "cat\n", "chosen": "the cat is what this hat is, and that is that", "rejected": "a cat"},
    {"prompt": "name the user:\n", "chosen": "Zoe.", "rejected": "Zoë, 7"},
    {"prompt": "x\n", "chosen": "z", "rejected": "y"},
    {"prompt": "the system says:\n", "chosen": "what the assistant says", "rejected": "say what"},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(policy, reference) directories: one architecture, different weights, one tokenizer."""
    directories = []
    for seed, name in enumerate(("policy", "reference")):
        path = tmp_path_factory.mktemp(name)
        make_checkpoint(path, "llama", seed=seed, vocab_size=304, attention_bias=True)
        make_tokenizer(path)
        directories.append(str(path))
    return directories


@pytest.fixture(scope="module")
def config(models):
    return read_model_config(models[0])


@pytest.fixture(scope="module")
def params(models, config):
    return [load_params(directory, config, None) for directory in models]


@pytest.fixture(scope="module")
def segments(models):
    """Chosen and rejected of each pair, without values."""
    encoder = TextEncoder(load_tokenizer(models[0]), ROW_LENGTH // 2)
    sides = [(row["prompt"], row[side]) for row in PAIRS for side in ("chosen", "rejected")]
    encoded = checked(encoder.encode_many(*zip(*sides, strict=True), ["row"] * len(sides)))
    assert not any(e.truncated for e in encoded)
    return [Segment(e.prompt_ids, e.response_ids) for e in encoded]


def score_all(params, config, segments, rows=2, row_length=ROW_LENGTH, alone=False):
    """The response log-probs of every segment, in the segments' order."""
    if alone:
        return [one for s in segments for one in score_all(params, config, [s], rows, row_length)]
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    scores = [s for part in score(params, segments, config, COMPUTE, BatchConfig(rows, row_length), mesh) for s in part]
    assert sorted(s.row for s in scores) == list(range(len(segments)))
    return [s.logprobs for s in sorted(scores, key=lambda s: s.row)]


@pytest.fixture(scope="module")
def reference_logprobs(params, config, segments):
    return score_all(params[1], config, segments)


def make_pairs(segments, ref_logprobs, weights=None):
    weights = weights or [np.ones(len(s.response), np.float32) for s in segments]
    filled = [
        Segment(s.prompt, s.response, {"weights": w, "ref_logprobs": r})
        for s, w, r in zip(segments, weights, ref_logprobs, strict=True)
    ]
    return list(zip(filled[::2], filled[1::2], strict=True))


def random_weights(segments):
    rng = np.random.default_rng(0)
    return [rng.uniform(0, 2, len(s.response)).astype(np.float32) for s in segments]


@functools.cache
def gradient_fn(config, loss, compute):
    objective = preference_objective(config, compute, loss)

    @jax.jit
    def fn(params, batch):
        totals = objective.count(batch)

        def of(params):
            total, metrics, bad = objective.loss(params, batch, totals)
            return total, {**metrics, "bad": bad}

        return jax.value_and_grad(of, has_aux=True)(params)

    return fn


def loss_and_gradients(params, config, pairs, loss, rows, compute=COMPUTE):
    """(loss, metrics, {path: gradient}) of pairs laid out in `rows`; always five rows, so that one shape compiles."""
    rows = rows + [[]] * (len(PAIRS) - len(rows))
    batch = fill_rows(rows, pairs, ROW_LENGTH, MAX_PAIRS, ("weights", "ref_logprobs"))
    (total, metrics), grads = gradient_fn(config, loss, compute)(params, batch)
    assert metrics.pop("bad") == -1
    return float(total), metrics, flatten(grads)


def packed_rows(pairs):
    rows = pack(example_lengths(pairs), ROW_LENGTH)
    assert len(rows) < len(pairs), "nothing is packed"
    return rows


def hf_gradients(grads, config):
    """Our gradients by their names in the checkpoint."""
    named = {}
    for spec in weight_table(config):
        layers = grads[spec.path] if spec.stacked else grads[spec.path][None]
        for name, layer in zip(spec.hf_names(config), layers, strict=True):
            named[name] = np.asarray(spec.to_hf(layer, config))
    return named


def assert_near(got, expected, what, rtol=RTOL):
    """Relative to the largest entry: what cancels within an array cannot be held entry by entry."""
    scale = np.abs(expected).max()
    assert scale > 0, f"{what} is zero"
    np.testing.assert_allclose(got, expected, rtol=0, atol=rtol * scale, err_msg=what)


def check_against_trl(theirs, got, config):
    total, metrics, grads = got
    np.testing.assert_allclose(total, theirs["loss"], rtol=RTOL)
    for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
        np.testing.assert_allclose(metrics[name], theirs[name.replace("/", "_")].mean(), rtol=RTOL, err_msg=name)
    margins = theirs["rewards_chosen"] - theirs["rewards_rejected"]
    np.testing.assert_allclose(metrics["rewards/margins"], margins.mean(), rtol=RTOL)
    np.testing.assert_allclose(metrics["rewards/accuracies"], (margins > 0).mean())
    ours = hf_gradients(grads, config)
    assert set(ours) == set(theirs["grads"])
    for name, gradient in theirs["grads"].items():
        assert_near(ours[name], gradient, name)


@pytest.mark.parametrize(("kind", "label_smoothing"), [("sigmoid", 0.0), ("hinge", 0.0), ("ipo", 0.0), ("robust", 0.2)])
def test_equals_trl(kind, label_smoothing, models, config, params, segments, reference_logprobs):
    loss = LossConfig(kind, BETA, label_smoothing, 0.0, 0.0)
    theirs = dpo_oracle(*models, PAIRS, loss_type=kind, beta=BETA, label_smoothing=label_smoothing)
    pairs = make_pairs(segments, reference_logprobs)
    got = loss_and_gradients(params[0], config, pairs, loss, packed_rows(pairs))
    assert 0 < got[1]["rewards/accuracies"] < 1, "pairs that are all won, or all lost, show little"
    check_against_trl(theirs, got, config)
    # Pair by pair: TRL's numbers are in the rows' order.
    for i in range(len(pairs)):
        _, metrics, _ = loss_and_gradients(params[0], config, pairs, loss, [[i]])
        for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
            np.testing.assert_allclose(metrics[name], theirs[name.replace("/", "_")][i], rtol=RTOL, err_msg=name)


def test_nll_term_equals_trls_sft_loss(models, config, params, segments, reference_logprobs):
    """TRL's loss_type [sigmoid, sft] with weights [1, 0.7] is the sum of the two; so are its gradients."""
    sigmoid, sft = (dpo_oracle(*models, PAIRS, loss_type=kind, beta=BETA) for kind in ("sigmoid", "sft"))
    pairs = make_pairs(segments, reference_logprobs)
    loss = LossConfig("sigmoid", BETA, 0.0, 0.0, nll_weight=0.7)
    got = loss_and_gradients(params[0], config, pairs, loss, packed_rows(pairs))
    np.testing.assert_allclose(got[1]["nll_loss"], sft["loss"], rtol=RTOL)
    theirs = sigmoid | {
        "loss": sigmoid["loss"] + 0.7 * sft["loss"],
        "grads": {name: g + 0.7 * sft["grads"][name] for name, g in sigmoid["grads"].items()},
    }
    check_against_trl(theirs, got, config)


def test_a_step_of_eight_pairs_equals_trls(models, config, params):
    """Of 22 pairs of any length, each step's loss and gradient are TRL's for the very pairs that it holds."""
    rng = np.random.default_rng(0)
    words = "what is this hat that the cat says to a user of the system".split()

    def text(most):
        return " ".join(rng.choice(words, rng.integers(1, most)))

    rows = [{"prompt": text(4) + "\n", "chosen": text(9), "rejected": text(9)} for _ in range(22)]
    encoder = TextEncoder(load_tokenizer(models[0]), 48)
    encoded = [encoder.encode(row["prompt"], row[side], "row") for row in rows for side in ("chosen", "rejected")]
    assert not any(e.truncated for e in encoded)
    segments = [Segment(e.prompt_ids, e.response_ids) for e in encoded]
    pairs = make_pairs(segments, score_all(params[1], config, segments))
    plan = plan_steps(example_lengths(pairs), 8, 1, seed=0, rows=1, row_length=96)
    assert len(plan) == 3 and len(plan.shapes[0]) > 1, "one row length shows little"
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    objective = preference_objective(config, COMPUTE, LossConfig("sigmoid", BETA, 0.0, 0.0, 0.0))
    keep = optax.chain(optax.trace(0.0), optax.scale(0.0))  # the gradient in its state, and nothing learnt
    step = jax.jit(make_train_step(objective, keep, lambda step: 0.0))
    state = TrainState.create(params[0], keep)
    for number, batch in enumerate(BatchIterator(plan, pairs, mesh, ("weights", "ref_logprobs"))):
        held = plan.examples(number)
        assert len(held) == (8, 8, 6)[number]
        state, metrics = step(state, batch)
        assert metrics["pairs"] == len(held)
        theirs = dpo_oracle(*models, [rows[i] for i in held], beta=BETA)
        check_against_trl(theirs, (metrics["loss"], metrics, flatten(state.opt_state[0].trace)), config)


def test_nll_term_is_unweighted(models, config, params, segments, reference_logprobs):
    """With token weights it adds what TRL's sft loss is without them, to the loss and to its gradients."""
    sft = dpo_oracle(*models, PAIRS, loss_type="sft", beta=BETA)
    pairs = make_pairs(segments, reference_logprobs, random_weights(segments))
    without, got = (
        loss_and_gradients(params[0], config, pairs, LossConfig("sigmoid", BETA, 0.0, 0.0, weight), packed_rows(pairs))
        for weight in (0.0, 0.7)
    )
    np.testing.assert_allclose(got[1]["nll_loss"], sft["loss"], rtol=RTOL)
    np.testing.assert_allclose(got[0] - without[0], 0.7 * sft["loss"], rtol=RTOL)
    before, after = (hf_gradients(grads, config) for _, _, grads in (without, got))
    for name, gradient in sft["grads"].items():
        assert_near(after[name] - before[name], 0.7 * gradient, name, rtol=1e-3)  # two near numbers' difference


def test_messages_equal_trl(models, config, params, tmp_path):
    """Conversational rows, with a template that sets nothing after the end token (TRL would train on it)."""
    rows = [
        {name: [{"role": role, "content": row[name]}] for name, role in
         (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))}
        for row in PAIRS[:3]
    ]  # fmt: skip
    tokenizer = load_tokenizer(models[0])
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    assert "<|im_end|>\n" not in tokenizer.apply_chat_template(rows[0]["prompt"], tokenize=False)
    directories = [shutil.copytree(directory, tmp_path / name) for directory, name in zip(models, "pr", strict=True)]
    for directory in directories:
        tokenizer.save_pretrained(directory)
    encoder = TextEncoder(tokenizer, ROW_LENGTH // 2)
    encoded = [encoder.encode(row["prompt"], row[side], "row") for row in rows for side in ("chosen", "rejected")]
    segments = [Segment(e.prompt_ids, e.response_ids) for e in encoded]
    pairs = make_pairs(segments, score_all(params[1], config, segments))
    theirs = dpo_oracle(*directories, rows, beta=BETA)
    loss = LossConfig("sigmoid", BETA, 0.0, 0.0, 0.0)
    got = loss_and_gradients(params[0], config, pairs, loss, [[i] for i in range(len(pairs))])
    check_against_trl(theirs, got, config)


@pytest.mark.parametrize("weighted", [False, True])
def test_step_zero(weighted, params, config, segments):
    """Policy equal to the reference, whose log-probs come from passes that pack the responses otherwise."""
    logprobs = score_all(params[0], config, segments, rows=3, row_length=64)
    weights = random_weights(segments) if weighted else None
    pairs = make_pairs(segments, logprobs, weights)
    loss = LossConfig("sigmoid", BETA, 0.0, 0.0, 0.0)
    total, metrics, _ = loss_and_gradients(params[0], config, pairs, loss, packed_rows(pairs))
    assert abs(total - math.log(2)) < 1e-6
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert abs(metrics[name]) < 1e-6, name


LAYOUTS = {
    # name: rows of segments, row length, one segment a batch
    "packed": (2, ROW_LENGTH, False),
    "packed-otherwise": (3, 64, False),
    "padded": (10, 50, True),
    "one-at-a-time": (1, 50, True),
}


def test_layouts_give_the_same_logprobs(params, config, segments):
    got = {name: score_all(params[0], config, segments, *layout) for name, layout in LAYOUTS.items()}
    for name, logprobs in got.items():
        for a, b, segment in zip(logprobs, got["one-at-a-time"], segments, strict=True):
            assert len(a) == len(segment.response)
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5, err_msg=name)
            assert a.max() < 0


def test_layouts_give_the_same_loss_and_gradients(params, config, segments, reference_logprobs):
    pairs = make_pairs(segments, reference_logprobs, random_weights(segments))
    loss = LossConfig("sigmoid", BETA, 0.0, 0.0, 0.0)
    packed_loss, packed_metrics, packed = loss_and_gradients(params[0], config, pairs, loss, packed_rows(pairs))
    padded = [[i] for i in range(len(pairs))]
    padded_loss, padded_metrics, padded_grads = loss_and_gradients(params[0], config, pairs, loss, padded)
    np.testing.assert_allclose(packed_loss, padded_loss, rtol=1e-5)
    for name in packed_metrics:
        np.testing.assert_allclose(packed_metrics[name], padded_metrics[name], rtol=1e-5, err_msg=name)
    alone = [loss_and_gradients(params[0], config, pairs, loss, [[i]]) for i in range(len(pairs))]
    one_loss = np.mean([total for total, _, _ in alone])
    one_grads = {path: np.mean([grads[path] for _, _, grads in alone], axis=0) for path in packed}
    np.testing.assert_allclose(packed_loss, one_loss, rtol=1e-5)
    largest = max(np.abs(g).max() for g in packed.values())
    for path, gradient in packed.items():
        for name, other in (("padded", padded_grads), ("one at a time", one_grads)):
            np.testing.assert_allclose(other[path], gradient, rtol=0, atol=1e-5 * largest, err_msg=f"{name} {path}")


@pytest.mark.parametrize("how", [*({"remat": policy} for policy in REMAT_POLICIES), {"scan_unroll": 2}], ids=str)
@pytest.mark.slow
def test_remat_and_unrolling_change_nothing(how, params, config, segments, reference_logprobs):
    pairs = make_pairs(segments, reference_logprobs)
    loss = LossConfig("sigmoid", BETA, 0.0, 0.0, 0.0)
    rows = packed_rows(pairs)
    plain, _, expected = loss_and_gradients(params[0], config, pairs, loss, rows)
    compute = ComputeConfig("float32", logprob_chunk=16, **how)
    total, _, grads = loss_and_gradients(params[0], config, pairs, loss, rows, compute)
    np.testing.assert_allclose(total, plain, rtol=1e-6)
    for path, gradient in expected.items():
        assert_near(grads[path], gradient, path, 1e-5)


def test_remat_recomputes(params, config, segments, reference_logprobs):
    """Saving less leaves less for the backward pass to find: the policies are no names for one thing."""
    pairs = make_pairs(segments, reference_logprobs)
    batch = jax.tree.map(jnp.asarray, fill_rows(packed_rows(pairs), pairs, ROW_LENGTH, MAX_PAIRS, pairs[0][0].values))

    def saved(policy):
        objective = preference_objective(
            config, ComputeConfig("float32", remat=policy), LossConfig("sigmoid", 1, 0, 0, 0)
        )
        _, pull_back = jax.eval_shape(
            lambda p: jax.vjp(lambda p: objective.loss(p, batch, objective.count(batch))[0], p), params[0]
        )
        return sum(x.size for x in jax.tree.leaves(pull_back))

    sizes = [saved(policy) for policy in ("full", "save_matmuls", "none")]
    assert sizes == sorted(set(sizes)), sizes
