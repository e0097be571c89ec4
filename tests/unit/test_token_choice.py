"""The choice of a token against the exact distribution, and every filter against transformers' logits processors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from lm_jax.generation import token_choice
from lm_jax.generation.requests import SamplingConfig
from lm_jax.generation.token_choice import choose_tokens, filters_of

DRAWS = 24_000
VOCABULARIES = {"small": 11, "one-group": 128, "groups": 300}
JUST_UNDER_ONE = np.nextafter(np.float32(1), np.float32(0))
choose = jax.jit(choose_tokens, static_argnames="filters")
weigh = jax.jit(token_choice._weights, static_argnames="filters")


def sampling(**fields):
    return SamplingConfig(max_new_tokens=1, **fields)


def chosen(logits, uniform, seen=None, known=None, **fields):
    """(tokens, log-probs) of `choose_tokens` under sampling settings, as arrays of numpy."""
    filters, strengths = filters_of(sampling(**fields))
    out = choose(jnp.asarray(logits, jnp.float32), seen, known, jnp.asarray(uniform, jnp.float32), filters, strengths)
    return [np.asarray(x) for x in out]


def exact(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """[V] fp64: the distribution by its definition, token by token in order of likelihood; no ties."""
    scaled = np.asarray(logits, np.float64) / temperature
    probs = np.exp(scaled - scaled.max())
    order = np.argsort(-probs)
    if top_k:
        probs[order[top_k:]] = 0
    probs /= probs.sum()
    if top_p < 1:
        reached = 0.0
        for token in order:
            if reached >= top_p:
                probs[token] = 0
            reached += probs[token]
    probs[probs < min_p * probs.max()] = 0
    return probs / probs.sum()


def random_logits(vocab, seed=0, spread=2.0):
    return (spread * np.random.default_rng(seed).standard_normal(vocab)).astype(np.float32)


def chi_squared_limit(degrees):
    """What a chi-squared variable exceeds once in a million (Wilson and Hilferty's approximation)."""
    return degrees * (1 - 2 / (9 * degrees) + 4.753 * (2 / (9 * degrees)) ** 0.5) ** 3


SETTINGS = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 2.5},
    "top-k": {"top_k": 5},
    "top-k-one": {"top_k": 1},
    "top-k-beyond": {"top_k": 10_000},
    "top-p": {"top_p": 0.7},
    "top-p-tiny": {"top_p": 1e-6},
    "min-p": {"min_p": 0.15},
    "min-p-all": {"min_p": 1.0},
    "top-k-top-p": {"top_k": 6, "top_p": 0.8, "temperature": 1.3},
    "all": {"top_k": 9, "top_p": 0.95, "min_p": 0.08, "temperature": 1.7},
}


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_frequencies(setting, vocab):
    """Chi-squared of draws by even random numbers against the exact distribution."""
    size, fields = VOCABULARIES[vocab], SETTINGS[setting]
    logits = random_logits(size)
    probs = exact(logits, **fields)
    uniform = np.random.default_rng(1).random(DRAWS, np.float32)
    tokens, _ = chosen(np.broadcast_to(logits, (DRAWS, size)), uniform, **fields)
    counts = np.bincount(tokens, minlength=size)
    assert not counts[probs == 0].any(), "a token was drawn that the filters leave out"
    likely = probs * DRAWS >= 5
    expected = np.append(probs[likely], probs[~likely].sum()) * DRAWS
    observed = np.append(counts[likely], counts[~likely].sum())
    if expected[-1] == 0:
        expected, observed = expected[:-1], observed[:-1]
    if len(expected) == 1:
        assert observed[0] == DRAWS
        return
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert statistic < chi_squared_limit(len(expected) - 1)
    # The test can tell distributions apart: the same draws are no sample of a hotter one
    other = exact(logits, **{**fields, "temperature": 1.5 * fields.get("temperature", 1.0)})
    if (other > 0).sum() == (probs > 0).sum():
        there = other[likely] * DRAWS
        assert ((counts[likely] - there) ** 2 / there).sum() > chi_squared_limit(len(expected) - 1)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_draw_inverts_the_cumulative_distribution(setting):
    """Each token in turn takes its share of [0, 1): an error of one place would show at every border."""
    size, fields = 300, SETTINGS[setting]
    logits = random_logits(size, seed=3)
    ends = np.cumsum(exact(logits, **fields))
    uniform = ((np.arange(DRAWS) + 0.5) / DRAWS).astype(np.float32)
    tokens, _ = chosen(np.broadcast_to(logits, (DRAWS, size)), uniform, **fields)
    clear = np.abs(ends[:, None] - uniform).min(axis=0) > 1e-5
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(tokens[clear], np.searchsorted(ends, uniform[clear], side="right"))


def processed(logits, *processors, ids=None):
    """[B, V] bool: what transformers' processors keep."""
    out = torch.tensor(logits)
    for processor in processors:
        out = processor(ids, out)
    return np.isfinite(out.numpy())


KEPT = {
    "top-k": ({"top_k": 7}, lambda: [theirs.TopKLogitsWarper(7)]),
    "top-k-one": ({"top_k": 1}, lambda: [theirs.TopKLogitsWarper(1)]),
    "top-p": ({"top_p": 0.6}, lambda: [theirs.TopPLogitsWarper(0.6)]),
    "top-p-high": ({"top_p": 0.999}, lambda: [theirs.TopPLogitsWarper(0.999)]),
    "min-p": ({"min_p": 0.1}, lambda: [theirs.MinPLogitsWarper(0.1)]),
    "all": (
        {"temperature": 1.6, "top_k": 20, "top_p": 0.85, "min_p": 0.12},
        lambda: [
            theirs.TemperatureLogitsWarper(1.6),
            theirs.TopKLogitsWarper(20),
            theirs.TopPLogitsWarper(0.85),
            theirs.MinPLogitsWarper(0.12),
        ],
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_filters_keep_what_transformers_keeps(name):
    """Also as a whole: the weights are transformers' probabilities up to a factor a row."""
    fields, processors = KEPT[name]
    logits = np.stack([random_logits(500, seed, spread) for seed in range(40) for spread in (0.5, 2.0, 5.0)])
    filters, strengths = filters_of(sampling(**fields))
    weights = np.asarray(weigh(jnp.asarray(logits), filters, strengths))
    kept = processed(logits, *processors())
    np.testing.assert_array_equal(weights > 0, kept)
    scaled = logits / fields.get("temperature", 1.0)
    expected = np.where(kept, np.exp(scaled - scaled.max(-1, keepdims=True)), 0)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 1.6, "top_k": 20, "top_p": 0.86, "min_p": 0.12},
        {"temperature": 1.6, "top_k": 6, "top_p": 0.85, "min_p": 0.12},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.85, "min_p": 0.12},
        {"temperature": 1.6, "top_k": 20, "top_p": 0.85, "min_p": 0.13},
    ],
)
def test_every_strength_counts(wrong):
    logits = np.stack([random_logits(500, seed, spread) for seed in range(40) for spread in (0.5, 2.0, 5.0)])
    right, others = (
        np.asarray(weigh(jnp.asarray(logits), *filters_of(sampling(**fields)))) > 0
        for fields in (KEPT["all"][0], wrong)
    )
    assert (right != others).any()


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        # Probabilities 0.4 0.3 0.2 0.1. Each case comes out otherwise with its filters in another order
        ({"top_k": 2, "top_p": 0.5}, {0}),  # of 4/7 and 3/7 the first is enough; of all, it is not
        ({"top_p": 0.75, "min_p": 0.6}, {0, 1}),  # min-p first would leave 4/7 and 3/7, as well
        ({"top_p": 0.55, "min_p": 0.6}, {0, 1}),  # min-p first would leave 4/7, which is enough
        ({"temperature": 0.5, "top_p": 0.5}, {0}),  # squared: 0.16 0.09 0.04 0.01 of 0.3
        ({"temperature": 0.5, "min_p": 0.3}, {0, 1}),
        ({"temperature": 2.0, "min_p": 0.6}, {0, 1, 2}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_p": 0.65}, {0, 1}),
        ({"top_p": 0.75}, {0, 1, 2}),
        ({"top_p": 0.95}, {0, 1, 2, 3}),
        ({"min_p": 0.45}, {0, 1, 2}),
    ],
)
def test_order_of_filters(fields, kept):
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))
    weights = weigh(jnp.asarray(logits), *filters_of(sampling(**fields)))
    assert set(np.flatnonzero(np.asarray(weights)[0])) == kept


def test_repetition_penalty_equals_transformers():
    """Positive and negative logits, before temperature and filters, greedy too."""
    rng = np.random.default_rng(0)
    logits = np.stack([random_logits(300, seed) for seed in range(60)])
    ids = rng.integers(0, 300, (60, 40))
    ids[:, 0] = logits.argmax(-1)  # the likeliest is always among them
    seen = np.zeros((60, 300), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    penalised = theirs.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(ids), torch.tensor(logits)).numpy()
    tokens, logprobs = chosen(logits, np.zeros(60), jnp.asarray(seen), repetition_penalty=1.7, temperature=0.0)
    np.testing.assert_array_equal(tokens, penalised.argmax(-1))
    assert (tokens != logits.argmax(-1)).any()
    whole = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    np.testing.assert_allclose(logprobs, whole[np.arange(60), tokens], atol=1e-5)

    fields = {"temperature": 1.4, "top_k": 30, "top_p": 0.8, "min_p": 0.05}
    uniform = rng.random(60, np.float32)
    tokens, logprobs = chosen(logits, uniform, jnp.asarray(seen), repetition_penalty=1.7, **fields)
    ends = [np.cumsum(exact(row, **fields)) for row in penalised]
    expected = [np.searchsorted(end, u, side="right") for end, u in zip(ends, uniform, strict=True)]
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_allclose(logprobs, whole[np.arange(60), tokens], atol=1e-5)


def test_greedy_needs_no_filter():
    logits = np.stack([random_logits(300, seed) for seed in range(20)])
    for fields in ({}, {"top_k": 3, "top_p": 0.1, "min_p": 0.9}):
        tokens, _ = chosen(logits, np.full(20, np.nan), temperature=0.0, **fields)
        np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_greedy_takes_the_first_of_equals_and_stays_inside_the_vocabulary():
    logits = np.random.default_rng(0).integers(0, 3, (20, 300)).astype(np.float32)
    tokens, _ = chosen(logits, np.full(20, np.nan), temperature=0.0)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    tokens, logprobs = chosen(np.full((1, 300), np.nan, np.float32), np.full(1, np.nan), temperature=0.0)
    assert 0 <= tokens[0] < 300 and np.isnan(logprobs[0])


def test_logprobs_are_the_models_own():
    """Before temperature and filters; extreme ones too."""
    logits = np.stack([random_logits(300, seed) for seed in range(20)] + [1e4 * random_logits(300, 21)])
    tokens, logprobs = chosen(logits, np.random.default_rng(0).random(21), temperature=0.3, top_k=4, top_p=0.9)
    wide = logits.astype(np.float64)
    top = wide.max(-1, keepdims=True)
    whole = wide - top - np.log(np.exp(wide - top).sum(-1, keepdims=True))
    np.testing.assert_allclose(logprobs, whole[np.arange(21), tokens], rtol=1e-6, atol=1e-5)


EXTREME = {
    "one-large": [0.0, 1e4, 0.0, -1e4],
    "all-large": [1e4, 1e4 - 1, 1e4 - 2, 1e4 - 30],
    "all-low": [-1e30, -1e30, -1e38, -1e38],
    "hidden": [-np.inf, 1.0, -np.inf, 0.5],
    "equal": [3.0] * 4,
    "far": [0.0, -100.0, -200.0, -1e30],
}


@pytest.mark.parametrize("setting", [*SETTINGS, "icy", "greedy"])
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_logits(name, setting):
    """Always a token of positive probability, at both ends of what a random number can be; repeated over groups."""
    fields = {"icy": {"temperature": 1e-36}, "greedy": {"temperature": 0.0}}.get(setting, SETTINGS.get(setting))
    logits = np.array(EXTREME[name], np.float32)
    scaled = (logits.astype(np.float64) - logits.max()) / (fields["temperature"] if fields.get("temperature") else 1.0)
    for copies in (1, 75):
        rows = np.broadcast_to(np.tile(logits, copies), (3, 4 * copies))
        tokens, logprobs = chosen(rows, [0.0, 0.5, JUST_UNDER_ONE], **fields)
        assert (scaled[tokens % 4] > -104).all(), tokens  # exp(-104) is 0 in fp32
        assert np.isfinite(logprobs).all() and (logprobs <= 1e-6).all()
        if setting in ("plain", "hot") and name == "equal":
            np.testing.assert_array_equal(tokens, [0, 2 * copies, 4 * copies - 1])


@pytest.mark.parametrize("size", [5, 128, 129, 300])
def test_ends_of_the_interval(size):
    """0 draws the first token that is left, just under 1 the last one, wherever they lie."""
    rng = np.random.default_rng(size)
    for _ in range(50):
        kept = np.sort(rng.choice(size, rng.integers(1, 4), replace=False))
        logits = np.full((2, size), -np.inf, np.float32)
        logits[:, kept] = rng.normal(size=len(kept)).astype(np.float32)
        np.testing.assert_array_equal(chosen(logits, [0.0, JUST_UNDER_ONE])[0], [kept[0], kept[-1]])


REAL_SIZES = (32_000, 49_152, 128_256, 151_936, 262_144)
draw = jax.jit(
    lambda weights, uniform: token_choice._draw(jnp.broadcast_to(weights, (len(uniform), len(weights))), uniform)
)


@pytest.mark.parametrize("size", REAL_SIZES)
@pytest.mark.parametrize("kept", [2, 50, 3000])
def test_rounding_never_draws_a_token_that_is_left_out(size, kept):
    """Random numbers right before and behind groups without a weight, where a parallel prefix sum can fall or rise."""
    rng = np.random.default_rng(size + kept)
    exposed = 0
    for _ in range(3):
        weights = np.zeros(size, np.float32)
        weights[rng.choice(size, kept, replace=False)] = np.exp(-rng.exponential(3, kept))
        sums = np.pad(weights, (0, -size % 128)).reshape(-1, 128).sum(1)
        running = np.asarray(jnp.cumsum(jnp.broadcast_to(sums, (2, len(sums))), axis=-1))[0]
        exposed += (np.diff(running)[sums[1:] == 0] != 0).any()
        borders = rng.permutation(np.unique(running / running[-1]).astype(np.float32))[:20]
        ulps = np.arange(-3, 4, dtype=np.float32)[:, None] * np.spacing(borders)
        uniform = np.clip(borders + ulps, 0, JUST_UNDER_ONE).ravel()
        uniform = np.pad(uniform, (0, 7 * 20 - len(uniform)))
        tokens = np.asarray(draw(jnp.asarray(weights), jnp.asarray(uniform)))
        assert (weights[tokens] > 0).all()
    assert exposed or kept != 50 or size < 100_000, "this prefix sum does not show what is tested"


@pytest.mark.parametrize("size", REAL_SIZES[::2])
@pytest.mark.parametrize("fields", [{}, {"top_k": 50, "top_p": 0.9}], ids=["plain", "filtered"])
def test_draws_of_real_vocabularies(size, fields):
    """Each draw lies where its random number falls in the exact cumulative distribution: its frequencies follow."""
    logits = random_logits(size, seed=size, spread=3.0)
    probs = exact(logits, **fields)
    uniform = np.random.default_rng(1).random(32 if fields else 256, np.float32)
    tokens = np.concatenate([
        chosen(np.broadcast_to(logits, (32, size)), part, **fields)[0] for part in uniform.reshape(-1, 32)
    ])  # fmt: skip
    ends = np.cumsum(probs)
    assert (probs[tokens] > 0).all()
    assert ((ends - probs)[tokens] < uniform + 2e-6).all() and (uniform < ends[tokens] + 2e-6).all()
    sixteenth = np.minimum((ends - probs / 2) * 16, 15).astype(int)
    places = np.bincount(sixteenth[tokens], minlength=16)
    expected = np.bincount(sixteenth, weights=probs, minlength=16) * len(uniform)
    likely = expected > 0
    statistic = ((places - expected)[likely] ** 2 / expected[likely]).sum()
    assert statistic < chi_squared_limit(likely.sum() - 1)


UNKNOWN = {"greedy": {"temperature": 0.0}, "top-k-all": {"top_k": 10_000}} | SETTINGS


@pytest.mark.parametrize("setting", UNKNOWN)
def test_tokens_that_are_not_known_are_never_chosen(setting):
    """As though the vocabulary had none of them, however likely they are; log-probs are those of the whole."""
    size, fields = 300, UNKNOWN[setting]
    known = np.random.default_rng(5).random(size) < 0.6
    logits = random_logits(size) + np.where(known, 0, 200).astype(np.float32)
    uniform = np.append(np.random.default_rng(6).random(500), [0.0, JUST_UNDER_ONE]).astype(np.float32)
    rows = np.broadcast_to(logits, (len(uniform), size))
    tokens, logprobs = chosen(rows, uniform, known=known, **fields)
    alone, _ = chosen(rows[:, known], uniform, **fields)
    np.testing.assert_array_equal(tokens, np.flatnonzero(known)[alone])
    np.testing.assert_allclose(logprobs, torch.log_softmax(torch.tensor(logits), -1).numpy()[tokens], atol=1e-4)
    nowhere, _ = chosen(np.full((1, size), np.nan), [0.5], known=known, **fields)
    assert known[nowhere].all()


def test_ties_are_kept():
    """At the border of a filter tokens that are equally likely stand or fall together."""
    logits = np.array([[1.0, 0.0, 0.0, 0.0, -5.0]], np.float32)
    for fields in ({"top_k": 2}, {"top_p": 0.6}):
        weights = np.asarray(weigh(jnp.asarray(logits), *filters_of(sampling(**fields))))
        assert set(np.flatnonzero(weights[0])) == {0, 1, 2, 3}


def test_strengths_compile_nothing_anew():
    calls = functools.partial(chosen, random_logits(64)[None], [0.3])
    calls(temperature=0.7, top_p=0.9, min_p=0.1)
    compiled = choose._cache_size()
    calls(temperature=0.8, top_p=0.5, min_p=0.2)
    assert choose._cache_size() == compiled
