"""Accumulation and evaluation are exact, the optimiser does what torch's does, and a bad row is named."""

import dataclasses
import functools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import optimization

from lm_jax.config import ComputeConfig, ModelConfig, OptimConfig, RopeConfig
from lm_jax.data.packing import Segment, fill_rows
from lm_jax.models.decoder import Decoder
from lm_jax.models.weights import flatten
from lm_jax.training.objective import Objective
from lm_jax.training.optim import make_optimizer, make_schedule
from lm_jax.training.step import TrainState, host_totals, make_evaluate, make_train_step
from musc_jax.training.losses import LossConfig
from musc_jax.training.objective import preference_objective

MODEL = ModelConfig("llama", 64, 2, 16, 24, 4, 2, 4, RopeConfig(10_000.0), 1e-5, 64, qkv_bias=True)
COMPUTE = ComputeConfig("float32", attention="reference", logprob_chunk=8)  # what compiles fastest
LOSS = LossConfig("sigmoid", 0.5, 0.1, 0.0, nll_weight=0.3)
# A large epsilon: AdamW would make as much of a gradient that is nothing but rounding as of any other.
OPTIM = OptimConfig(1e-2, "linear", 0.25, 0.1, 0.9, 0.99, eps=1e-3, weight_decay=0.1, clip_norm=0.5)
LENGTH, MAX_PAIRS = 24, 3
# Pairs in each row: 8 rows of 24 tokens, of very different token counts. The last two are padding.
ROWS = [[0, 1, 2], [3], [4, 5], [6], [], [7, 8], [], []]


@functools.cache
def pairs():
    rng = np.random.default_rng(0)

    def segment(prompt, size):
        values = {"weights": rng.uniform(0, 2, size), "ref_logprobs": rng.normal(-4, 1, size)}
        return Segment(prompt, rng.integers(0, 64, size), values)

    made = []
    for row in ROWS:
        for _ in row:
            room = LENGTH // len(row) // 2
            prompt = rng.integers(0, 64, 2)
            made.append(tuple(segment(prompt, int(rng.integers(1, room - 1))) for _ in range(2)))
    return made


def batch_of(rows, microbatches=1, pairs_=None, length=LENGTH):
    arrays = fill_rows(rows, pairs_ or pairs(), length, MAX_PAIRS, ("weights", "ref_logprobs"))
    return {k: v.reshape(microbatches, -1, *v.shape[1:]) for k, v in arrays.items()}


@functools.cache
def params():
    ids = jnp.ones((1, 4), jnp.int32)
    made = jax.jit(Decoder(MODEL, COMPUTE).init)(jax.random.key(0), ids, ids, ids)["params"]
    rng = np.random.default_rng(1)
    # Biases that are not 0, scales that are not 1, and distributions that are not flat.
    return jax.tree.map(lambda x: x + jnp.float32(0.2 * rng.standard_normal(x.shape)), made)


@functools.cache
def objective(loss=LOSS):
    return preference_objective(MODEL, COMPUTE, loss)


@functools.cache
def train_step(optim=OPTIM):
    """(the jitted step, a state before it); jit compiles once a number of microbatches."""
    schedule = make_schedule(optim, 10)
    optimizer = make_optimizer(optim, schedule)
    # From step 5 of the schedule, where the learning rate is not 0.
    state = TrainState.create(params(), optimizer)
    state = jax.tree.map(lambda x: jnp.full_like(x, 5) if x.dtype == jnp.int32 else x, state)
    state = state.replace(skipped=jnp.int32(0))
    return jax.jit(make_train_step(objective(), optimizer, schedule)), state


@functools.cache
def one_batch():
    step, state = train_step()
    return step(state, [batch_of(ROWS)])


@functools.cache
def four_microbatches():
    batch = batch_of(ROWS, 4)
    assert [bool(m.any()) for m in batch["loss_mask"]] == [True, True, True, False], "the last is padding alone"
    step, state = train_step()
    return step(state, [batch])


def gradients(state):
    """{path: gradient}, clipped: the first moment began at 0, so it is the gradient times 1 - beta1."""
    first_moment = optax.tree_utils.tree_get(state.opt_state, "mu")
    return {path: np.asarray(x) / (1 - OPTIM.beta1) for path, x in flatten(first_moment).items()}


@functools.cache
def stacks_of_three_lengths():
    """Rows that are full, rows that are longer than any needs, and a stack that holds nothing."""
    step, state = train_step()
    return step(state, [batch_of(ROWS[:3], 3), batch_of(ROWS[3:], 5, length=32), batch_of([[]] * 2, 2, length=8)])


@pytest.mark.parametrize("cut", [four_microbatches, stacks_of_three_lengths])
def test_accumulated_equals_one_batch(cut):
    """Rows with 2 to 20 response tokens, and microbatches of padding alone."""
    (got_state, got), (expected_state, expected) = cut(), one_batch()
    assert set(got) == set(expected)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, err_msg=name)

    expected_gradients = gradients(expected_state)
    largest = max(np.abs(g).max() for g in expected_gradients.values())
    for path, gradient in gradients(got_state).items():
        assert np.abs(gradient).max() > 1e-3 * largest, f"{path} has no gradient to speak of"
        np.testing.assert_allclose(gradient, expected_gradients[path], rtol=0, atol=1e-5 * largest, err_msg=path)
    for path, moved in flatten(expected_state.params).items():
        moved, scale = np.asarray(moved), np.abs(moved).max()
        assert np.abs(moved - flatten(params())[path]).max() > 1e-3 * scale, f"{path} did not move"
        np.testing.assert_allclose(flatten(got_state.params)[path], moved, rtol=0, atol=1e-5 * scale, err_msg=path)


@functools.cache
def evaluate():
    run = make_evaluate(objective())
    return lambda params, batches: run(params, batches, host_totals(objective(), batches))


def test_one_batch_by_hand():
    """The metrics and loss of a step are the means over pairs (and chosen tokens) that they claim to be."""
    _, metrics = one_batch()
    apart = [evaluate()(params(), [batch_of([[i]])]) for i in range(9)]
    assert metrics["pairs"] == 9
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        np.testing.assert_allclose(metrics[name], np.mean([m[name] for m in apart]), rtol=1e-5, err_msg=name)
    tokens = [len(chosen.response) for chosen, _ in pairs()]
    nll = np.average([m["nll_loss"] for m in apart], weights=tokens)
    np.testing.assert_allclose(metrics["nll_loss"], nll, rtol=1e-5)
    preference = np.mean([m["loss"] - 0.3 * m["nll_loss"] for m in apart])
    np.testing.assert_allclose(metrics["loss"], preference + 0.3 * nll, rtol=1e-5)
    assert len({round(m["nll_loss"], 3) for m in apart}) == 9 and len(set(tokens)) > 3, "the pairs must differ"


def test_evaluation_is_exact_over_uneven_batches():
    """9 pairs as 3, 1, 2, 1, 0, 2, 0, 0 and in one batch: a mean of means would differ."""
    whole = evaluate()(params(), [batch_of(ROWS)])
    uneven = evaluate()(params(), [batch_of([row]) for row in ROWS])
    _, trained = one_batch()
    assert set(whole) == set(uneven) == set(trained) - {"grad_norm", "learning_rate", "skipped_steps", "bad_example"}
    for name in whole:
        np.testing.assert_allclose(uneven[name], whole[name], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(whole[name], trained[name], rtol=1e-5, err_msg=name)


def test_totals_are_counted_on_the_host():
    """What the count gives on a device, to the bit, without one."""
    batches = [batch_of(ROWS[i : i + 4], 2) for i in (0, 4)]
    with jax.transfer_guard("disallow"):
        totals = host_totals(objective(), batches)
    counted = [jax.vmap(objective().count)(batch) for batch in batches]
    assert {name: float(number) for name, number in totals.items()} == {
        name: sum(float(c[name].sum()) for c in counted) for name in counted[0]
    }
    assert totals["pairs"] == 9 and 9 < totals["chosen_tokens"] == sum(len(chosen.response) for chosen, _ in pairs())


def test_totals_count_by_ones_beyond_what_fp32_does():
    def tokens(number):
        ones = {"loss_mask": np.float32(1), "segment_ids": np.int32(1), "example_ids": np.int32(0)}
        return {name: np.broadcast_to(one, (1, number // 4096 or 1, min(number, 4096))) for name, one in ones.items()}

    batches = [tokens(2**24), *[tokens(1)] * 4]
    assert host_totals(objective(), batches)["chosen_tokens"] == 2**24 + 4


def test_an_evaluation_holds_two_batches_at_most():
    def total(params, batch, totals):
        return (params * batch["x"]).sum() / totals["n"], {}, jnp.int32(-1)

    held: list[weakref.ref] = []
    most = [0]

    def batches(make):
        for number in range(12):
            most[0] = max(most[0], sum(ref() is not None for ref in held))
            batch = {"x": make(np.full((2, 3), number, np.float32))}
            held.append(weakref.ref(batch["x"]))
            yield batch
            del batch

    adds = Objective(lambda batch: {"n": batch["x"].size}, total)
    totals = host_totals(adds, batches(np.asarray))
    held.clear()
    assert make_evaluate(adds)(2.0, batches(jnp.asarray), totals) == {"loss": pytest.approx(2 * 5.5)}
    assert len(held) == 12 and 1 <= most[0] <= 2


def test_padding_alone_is_zero():
    step, state = train_step()
    _, metrics = step(state, [batch_of([[]] * 8)])
    assert metrics["loss"] == 0 and metrics["pairs"] == 0 and metrics["grad_norm"] == 0
    assert metrics["bad_example"] == -1


# Schedules.


def theirs(config, num_steps):
    """transformers' learning rate at every step, and one beyond the end."""
    warmup = int(np.ceil(config.warmup_ratio * num_steps))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.learning_rate)
    scheduler = {
        "cosine": lambda: (
            optimization.get_cosine_with_min_lr_schedule_with_warmup(
                optimizer, warmup, num_steps, min_lr_rate=config.final_ratio
            )
            if config.final_ratio
            else optimization.get_cosine_schedule_with_warmup(optimizer, warmup, num_steps)
        ),
        "linear": lambda: optimization.get_linear_schedule_with_warmup(optimizer, warmup, num_steps),
        "constant": lambda: optimization.get_constant_schedule_with_warmup(optimizer, warmup),
    }[config.schedule]()
    rates = []
    for _ in range(num_steps + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("num_steps", [1, 7, 40])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("schedule", "final"), [("cosine", 0.0), ("cosine", 0.2), ("linear", 0.0), ("constant", 0.0)])
def test_schedule_equals_transformers(schedule, final, warmup_ratio, num_steps):
    config = dataclasses.replace(OPTIM, schedule=schedule, warmup_ratio=warmup_ratio, final_ratio=final)
    ours = make_schedule(config, num_steps)
    expected = theirs(config, num_steps)
    if warmup_ratio * num_steps > num_steps - 1:
        expected = expected[:-1]  # the warm-up takes all steps, and none follows
    got = [ours(jnp.int32(step)) for step in range(len(expected))]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7 * config.learning_rate)


def test_linear_with_a_floor():
    """Peak 0.01, warm-up 2 of 10 steps, floor 0.1: halfway down it is 0.01 * (0.1 + 0.9 / 2)."""
    schedule = make_schedule(dataclasses.replace(OPTIM, warmup_ratio=0.2), 10)
    np.testing.assert_allclose([schedule(s) for s in (0, 1, 2, 6, 10, 99)], [0, 5e-3, 1e-2, 5.5e-3, 1e-3, 1e-3])


# The optimiser.

NO_DECAY = {"layers/attn_norm/scale", "layers/mlp_norm/scale", "final_norm/scale"} | {
    f"layers/attn/{name}/bias" for name in "qkv"
}


def test_decay_on_matrices_alone():
    """With gradients of zero, AdamW moves what it decays and nothing else: by lr * weight_decay."""
    optimizer = make_optimizer(OPTIM, lambda step: 0.1)
    zeros = jax.tree.map(np.zeros_like, params())
    flat = flatten(jax.jit(lambda p: optimizer.update(zeros, optimizer.init(p), p)[0])(params()))
    assert {path for path, update in flat.items() if not np.any(update)} == NO_DECAY
    assert {"embed/embedding", "lm_head/kernel", "layers/attn/q/kernel", "layers/mlp/down/kernel"} <= set(flat)
    for path in set(flat) - NO_DECAY:
        np.testing.assert_allclose(flat[path], -0.1 * 0.1 * flatten(params())[path], rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e3])
def test_optimizer_equals_torch(clip_norm):
    """Three steps of clipping and AdamW on the same gradients; 0 does not clip."""
    config = dataclasses.replace(OPTIM, clip_norm=clip_norm, schedule="cosine")
    rng = np.random.default_rng(0)
    start = {"kernel": rng.standard_normal((3, 4)), "bias": rng.standard_normal(4)}
    grads = [{k: rng.standard_normal(v.shape) * s for k, v in start.items()} for s in (1.0, 3.0, 0.01)]

    schedule = make_schedule(config, 8)
    optimizer = make_optimizer(config, schedule)
    ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
    opt_state = optimizer.init(ours)
    theirs = {k: torch.nn.Parameter(torch.tensor(v, dtype=torch.float32)) for k, v in start.items()}
    torch_optimizer = torch.optim.AdamW(
        [
            {"params": [theirs["kernel"]], "weight_decay": config.weight_decay},
            {"params": [theirs["bias"]], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )
    scheduler = optimization.get_cosine_with_min_lr_schedule_with_warmup(torch_optimizer, 2, 8, min_lr_rate=0.1)
    for grad in grads:
        updates, opt_state = optimizer.update(jax.tree.map(jnp.float32, grad), opt_state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(grad[name], dtype=torch.float32)
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(theirs.values(), clip_norm)
        torch_optimizer.step()
        scheduler.step()
    for name, parameter in theirs.items():
        np.testing.assert_allclose(ours[name], parameter.detach(), rtol=2e-6, atol=1e-6, err_msg=name)
    assert np.abs(ours["bias"] - start["bias"]).max() > 1e-3


def test_first_moments_in_bfloat16_take_half_and_change_little():
    start, grad = {"kernel": jnp.ones((64, 64))}, {"kernel": jnp.linspace(-1.0, 1.0, 4096).reshape(64, 64)}
    moved: dict[str, np.ndarray] = {}
    for dtype in ("auto", "float32", "bfloat16"):
        config = dataclasses.replace(OPTIM, mu_dtype=dtype, weight_decay=0.0)
        optimizer = make_optimizer(config, lambda step: 1e-2)
        state, params = optimizer.init(start), start
        for scale in (1.0, 0.5, -2.0):
            updates, state = optimizer.update({"kernel": scale * grad["kernel"]}, state, params)
            params = optax.apply_updates(params, updates)
        (adam,) = (s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
        assert adam.mu["kernel"].dtype == ("float32" if dtype == "auto" else dtype)
        assert adam.nu["kernel"].dtype == "float32"
        assert params["kernel"].dtype == "float32"
        moved[dtype] = np.asarray(params["kernel"] - 1)
    np.testing.assert_array_equal(moved["auto"], moved["float32"])
    np.testing.assert_allclose(moved["bfloat16"], moved["float32"], rtol=2e-2, atol=1e-5)
    assert (moved["bfloat16"] != moved["float32"]).any()


def test_clipping_and_what_is_reported():
    """`grad_norm` is that before clipping; 2 w x / 3 summed over the batch is (6, 8), of norm 10, worked by hand."""

    def loss(params, micro, totals):
        total = jnp.sum(micro["x"] * params["kernel"] ** 2) / totals["rows"]
        return total, {"squares": total}, jnp.int32(-1)

    objective = Objective(lambda micro: {"rows": jnp.float32(micro["x"].shape[0])}, loss)
    batch = [{"x": jnp.array([[[3.0, 0.0]], [[0.0, 12.0]], [[6.0, 0.0]]])}]
    optimizer = make_optimizer(dataclasses.replace(OPTIM, eps=1e-8, weight_decay=0.0), lambda step: 0.25)
    state = TrainState.create({"kernel": jnp.array([1.0, 1.0])}, optimizer)
    state, metrics = jax.jit(make_train_step(objective, optimizer, lambda step: 0.25 + step))(state, batch)
    assert metrics["grad_norm"] == 10 and metrics["loss"] == metrics["squares"] == 7
    assert metrics["learning_rate"] == 0.25 and state.step == 1
    np.testing.assert_allclose(gradients(state)["kernel"], [0.3, 0.4], rtol=1e-5)  # clipped to a norm of 0.5
    np.testing.assert_allclose(state.params["kernel"], [0.75, 0.75], rtol=1e-5)  # Adam's first step is the rate


def test_a_microbatch_that_holds_nothing_is_not_computed():
    """Its loss would be NaN. One whose count is NaN holds something, which must not stay unseen."""

    def loss(params, micro, totals):
        x = micro["x"][0]
        return x * params["kernel"] / jnp.where(x == 0, jnp.nan, 1) / totals["rows"], {}, jnp.int32(-1)

    objective = Objective(lambda micro: {"rows": jnp.sum(micro["x"])}, loss)
    optimizer = optax.sgd(0.1)
    step = jax.jit(make_train_step(objective, optimizer, lambda step: 0.1))
    state = TrainState.create({"kernel": jnp.float32(3)}, optimizer)
    filled = [{"x": jnp.array([[0.0], [2.0]])}, {"x": jnp.array([[0.0]])}, {"x": jnp.array([[6.0], [0.0]])}]
    assert step(state, filled)[1]["loss"] == 3
    assert np.isnan(step(state, [*filled[:2], {"x": jnp.array([[jnp.nan], [0.0]])}])[1]["loss"])
    assert np.isnan(step(state, [{"x": jnp.array([[0.0], [jnp.nan]])}])[1]["loss"])


@pytest.mark.parametrize(("bad", "value"), [(5, np.nan), (0, np.inf), (8, -np.inf)])
@pytest.mark.parametrize("side", [0, 1])
def test_bad_example_is_named(bad, value, side):
    """A weight that is no number spoils one pair's loss, and that pair's id is reported."""
    spoiled = list(pairs())
    segments = list(spoiled[bad])
    weights = segments[side].values["weights"].copy()
    weights[-1] = value
    segments[side] = dataclasses.replace(segments[side], values={**segments[side].values, "weights": weights})
    spoiled[bad] = tuple(segments)
    step, state = train_step()
    _, metrics = step(state, [batch_of(ROWS, 4, spoiled)])
    assert metrics["bad_example"] == bad
    assert not np.isfinite(metrics["loss"])
    assert one_batch()[1]["bad_example"] == -1
