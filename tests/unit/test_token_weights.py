"""Weight rules by hand-worked numbers, the contrast head against numpy, and rows that point at a store."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.data.preference import PreferenceRow
from lm_jax.data.score_store import ScoreStore
from lm_jax.data.text import checked
from lm_jax.errors import UserError
from lm_jax.scoring.contexts import contrast_head
from musc_jax.training.examples import rule_for
from musc_jax.weights import rules as token_weights
from musc_jax.weights.command import perturbed_of
from musc_jax.weights.rules import CHOSEN, REJECTED, WEIGHING_RULES, ResponseScores, contexts_of, parse_rules
from musc_jax.weights.stored import COLUMN, key_digest, pair_fingerprint, store_as_written, stored_fields


def array(*values):
    return np.array(values, np.float32)


def scores(side=CHOSEN, draw=(0, "id"), **changes):
    given = {
        "logprobs": {
            "full": array(-1, -2, -3, -10),
            "perturbed": array(-1, -1, -1, -1),
            "none": array(-2, -1, -4, -15),
        },
        "entropies": {"full": array(1, 0, 0.5, 3), "perturbed": array(2, 0, 0, 1), "none": array(1, 1, 1, 1)},
        "kl": array(0, 1, 2, 5),
        "reverse_kl": array(0, 0, 4, 0),
    }
    return ResponseScores(**{**given, **changes}, is_chosen=side == CHOSEN, draw=draw)


@pytest.mark.parametrize(
    ("rule", "side", "expected"),
    [
        ("calibrated_entropy", CHOSEN, [0.6, 1.2, 2, 2]),  # 1/2, 0/0, x/0, 3/1
        ("calibrated_entropy", REJECTED, [0.6, 1.2, 2, 2]),
        ("other_over_own", CHOSEN, [2, 1.2, 0, 0.4]),
        ("other_over_own", REJECTED, [0.6, 1.2, 2, 2]),
        ("uniform", CHOSEN, [1, 1, 1, 1]),
        ("perplexity", CHOSEN, [0.25, 0.5, 0.75, 2]),
        ("entropy", CHOSEN, [1 / 1.125, 0, 0.5 / 1.125, 2]),
        ("kl", CHOSEN, [0, 0.5, 1, 2]),
        ("symmetric_kl", CHOSEN, [0, 1 / 3, 2, 5 / 3]),
        ("pmi", CHOSEN, [1 / 1.75, 0, 1 / 1.75, 2]),  # 1, -1 (counts as 0), 1, 5
    ],
)
def test_rules(rule, side, expected):
    weights = WEIGHING_RULES[rule].weigh(scores(side))
    np.testing.assert_allclose(weights, expected, rtol=1e-5, atol=1e-5)
    assert weights.dtype == np.float32


def test_a_negative_mean_does_not_turn_pmi_around():
    """Most tokens are likelier without the instruction: the one that is not gets the weight."""
    logprobs = {"full": array(-5, -5, -1), "none": array(-1, -1, -2)}
    np.testing.assert_array_equal(WEIGHING_RULES["pmi"].weigh(scores(logprobs=logprobs)), [0, 0, 2])
    logprobs = {"full": array(-5, -5), "none": array(-1, -1)}
    np.testing.assert_array_equal(WEIGHING_RULES["pmi"].weigh(scores(logprobs=logprobs)), [1, 1])


def test_rounding_is_no_contrast():
    """What fp32 leaves of entropies and divergences that are 0 weighs as 0/0 does, not as a ratio of noise."""
    noise = array(1e-7, 3e-8, 5e-7, 0)
    quiet = scores(entropies={"full": noise, "perturbed": noise[::-1]}, kl=noise, reverse_kl=noise[::-1])
    np.testing.assert_allclose(WEIGHING_RULES["calibrated_entropy"].weigh(quiet), 1.2, rtol=1e-6)
    for rule in ("kl", "symmetric_kl", "entropy"):
        np.testing.assert_array_equal(WEIGHING_RULES[rule].weigh(quiet), 1)


def test_nothing_but_the_side_and_the_draw_tells_chosen_from_rejected():
    for name, rule in WEIGHING_RULES.items():
        same = np.array_equal(rule.weigh(scores(CHOSEN)), rule.weigh(scores(REJECTED)))
        assert same == (name not in ("other_over_own", "shuffled")), name


def test_shuffled_is_the_default_in_another_order():
    rng = np.random.default_rng(0)
    entropies = {name: rng.uniform(0.5, 1, 50).astype(np.float32) for name in ("full", "perturbed")}
    default = WEIGHING_RULES[token_weights.DEFAULT_RULE].weigh(scores(entropies=entropies))
    draws = [(0, "a", CHOSEN), (0, "a", REJECTED), (0, "b", CHOSEN), (1, "a", CHOSEN)]
    orders = []
    for seed, row, side in draws:
        weights = WEIGHING_RULES["shuffled"].weigh(scores(side, (seed, row), entropies=entropies))
        again = WEIGHING_RULES["shuffled"].weigh(scores(side, (seed, row), entropies=entropies))
        np.testing.assert_array_equal(weights, again)
        np.testing.assert_array_equal(np.sort(weights), np.sort(default))
        orders.append(tuple(weights))
    assert len({*orders, tuple(default)}) == 5


@pytest.mark.parametrize(
    ("rules", "contexts"),
    [
        (["calibrated_entropy"], ("full", "perturbed")),
        (["pmi"], ("full", "none")),
        (["entropy", "uniform"], ("full",)),
        (["pmi", "kl"], ("full", "perturbed", "none")),
        (list(WEIGHING_RULES), ("full", "perturbed", "none")),
    ],
)
def test_only_the_contexts_that_are_read(rules, contexts):
    assert contexts_of(rules) == contexts
    only = {c: scores().logprobs[c] for c in contexts}
    for rule in rules:  # nothing else is touched
        given = scores(logprobs=only, entropies={c: scores().entropies[c] for c in contexts})
        WEIGHING_RULES[rule].weigh(given)
        if not WEIGHING_RULES[rule].divergences:
            WEIGHING_RULES[rule].weigh(dataclasses.replace(given, kl=None, reverse_kl=None))


def test_parse_rules():
    assert parse_rules("kl, pmi") == ("kl", "pmi")
    assert parse_rules("all") == tuple(WEIGHING_RULES)
    for text, says in (("", "no rule in ''"), ("kl,surprise", "unknown rule 'surprise'"), ("kl,kl", "stands twice")):
        with pytest.raises(UserError, match=f"config.rules: .*{says}"):
            parse_rules(text)


def test_names_for_training():
    for name in ("auto", "store", *(f"store:{rule}" for rule in WEIGHING_RULES)):
        token_weights.check_rule(name)
    with pytest.raises(UserError, match="unknown rule 'kl'; .*kl has to be weighed first, then choose store:kl"):
        token_weights.check_rule("kl")
    with pytest.raises(UserError, match="unknown rule 'store:columns'"):
        token_weights.check_rule("store:columns")


# The head: two rows, each of some examples of C segments (prompt length, response length)

V, D, T = 23, 6, 40


def layout(num_prompts, rows):
    """Targets, mask, segment ids [B, T], and for every row its response tokens' positions under each prompt [S, C]."""
    targets = np.random.default_rng(1).integers(0, V, (len(rows), T)).astype(np.int32)
    mask, segment_ids = np.zeros((len(rows), T), np.float32), np.zeros((len(rows), T), np.int32)
    where = []
    for b, examples in enumerate(rows):
        start = segment = 0
        positions = []
        for prompts, response in examples:
            assert len(prompts) == num_prompts
            firsts = []
            for prompt in prompts:
                segment += 1
                segment_ids[b, start : start + prompt + response] = segment
                firsts.append(start + prompt - 1)
                mask[b, firsts[-1] : firsts[-1] + response] = 1
                start += prompt + response
            positions += [[first + j for first in firsts] for j in range(response)]
        assert start <= T
        where.append(np.array(positions, int).reshape(-1, num_prompts))
    return targets, mask, segment_ids, where


LAYOUTS = {
    "one prompt": (1, [[((3,), 5), ((1,), 9)], []]),
    "two prompts": (2, [[((3, 1), 5), ((2, 7), 4)], [((1, 1), 19)]]),
    "three prompts": (3, [[((4, 2, 1), 3), ((1, 1, 2), 6)], [((1, 1, 1), 1)], []]),
    "as many tokens as fit": (2, [[((1, 1), 19)], [((2, 1), 1)]]),
}


@functools.cache
def head_inputs(rows):
    rng = np.random.default_rng(0)
    return rng.standard_normal((rows, T, D)).astype(np.float32), rng.standard_normal((V, D)).astype(np.float32)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_the_head_equals_numpy(name, chunk):
    num_prompts, rows = LAYOUTS[name]
    targets, mask, segment_ids, where = layout(num_prompts, rows)
    hidden, embedding = head_inputs(len(rows))
    divergences = num_prompts > 1
    fn = jax.jit(contrast_head, static_argnames=("num_prompts", "chunk", "divergences"))
    found = fn(
        hidden, embedding, targets, mask, segment_ids, num_prompts=num_prompts, chunk=chunk, divergences=divergences
    )
    logits = hidden.astype(np.float64) @ embedding.T.astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for b, at in enumerate(where):
        used = slice(0, len(at))
        here = logp[b, at]  # [S, C, V]
        own = np.take_along_axis(here, targets[b, at][..., None], -1)[..., 0]
        np.testing.assert_allclose(found[0][b, used], own, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found[1][b, used], -(np.exp(here) * here).sum(-1), rtol=1e-5, atol=1e-5)
        if divergences:
            p, q = here[:, 0], here[:, 1]
            kl = [(np.exp(p) * (p - q)).sum(-1), (np.exp(q) * (q - p)).sum(-1)]
            np.testing.assert_allclose(found[2][b, used], np.stack(kl, -1), rtol=1e-5, atol=1e-5)
        else:
            assert found[2] is None


def test_rows_of_padding_count_for_nothing():
    targets, mask, segment_ids, where = layout(2, [[((1, 1), 19)]])
    hidden, embedding = head_inputs(1)
    padded = np.concatenate([embedding, 9 * embedding[:3]])
    expected = contrast_head(hidden, embedding, targets, mask, segment_ids, 2, 8, True)
    found = contrast_head(hidden, padded, targets, mask, segment_ids, 2, 8, True, len(embedding))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a[0, : len(where[0])], b[0, : len(where[0])], rtol=0, atol=1e-5)


def test_the_entropy_of_a_token_that_is_all_but_certain():
    """Large logits, entropies of 1e-4 and below: right to a few 1e-7, where a large normaliser would drown them."""
    targets, mask, segment_ids, where = layout(2, [[((1, 1), 19)]])
    gaps = np.linspace(8, 25, T)
    hidden = np.zeros((1, T, D), np.float32)
    hidden[0, :, 0], hidden[0, :, 1] = 60 + gaps, 60.0
    embedding = np.eye(V, D, dtype=np.float32)
    _, entropies, kl = contrast_head(hidden, embedding, targets, mask, segment_ids, 2, 8, True)
    logits = hidden.astype(np.float64) @ embedding.T
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -(np.exp(logp) * logp).sum(-1)[0, where[0]]
    assert expected.max() > 1e-3 and expected.min() < 1e-8
    np.testing.assert_allclose(entropies[0, :19], expected, rtol=1e-3, atol=3e-7)
    assert (np.asarray(entropies) >= 0).all() and (np.asarray(kl) >= 0).all()


def test_nan_stays_nan():
    targets, mask, segment_ids, _ = layout(2, [[((1, 1), 3)]])
    hidden, embedding = head_inputs(1)
    hidden = hidden.copy()
    hidden[0, 1] = np.nan
    _, entropies, kl = contrast_head(hidden, embedding, targets, mask, segment_ids, 2, 8, True)
    assert np.isnan(entropies[0, 1, 0]) and np.isfinite(entropies[0, 1, 1]) and np.isnan(kl[0, 1]).all()


def temporary_bytes(length, chunk, vocab=4096, width=16):
    struct = jax.ShapeDtypeStruct
    fn = functools.partial(contrast_head, num_prompts=2, chunk=chunk, divergences=True)
    compiled = (
        jax.jit(fn)
        .lower(
            struct((1, length, width), jnp.float32),
            struct((vocab, width), jnp.float32),
            struct((1, length), jnp.int32),
            struct((1, length), jnp.float32),
            struct((1, length), jnp.int32),
        )
        .compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes


def test_distributions_are_never_kept():
    """Four times the tokens cost a few copies of [T, D]; a chunk's logits are what a chunk costs."""
    vocab, width, chunk = 4096, 16, 32
    short, long = temporary_bytes(256, chunk), temporary_bytes(1024, chunk)
    assert (long - short) / 768 < 10 * width * 4
    assert short < 8 * chunk * vocab * 4
    assert temporary_bytes(1024, 1024) > 4 * long, "whole logits would show"


# Rows that point at a store

LENGTHS = [3, 2, 4, 1]
KEY = {"tokens": "t", "model": "m"}
PRINTS = ["p0", "p1"]


@pytest.fixture
def store(tmp_path):
    """Two pairs with the weights of two rules."""
    made = ScoreStore.create_or_open(
        str(tmp_path / "w.weights"), KEY, LENGTHS, ["calibrated_entropy", "kl", "entropy_full"]
    )
    values = {f: [np.full(n, i + 10 * k, np.float32) for i, n in enumerate(LENGTHS)] for k, f in enumerate(made.fields)}
    made.write(range(4), values)
    return made


def pointer(row, /, **changes):
    common = {"store": "w.weights", "key": key_digest(KEY), "row": row, "rule": "kl", "tokens": PRINTS[row]}
    return {COLUMN: common | changes}


def read(tmp_path, rows, order=(0, 1), weights="store", lengths=((3, 2), (4, 1))):
    fields = stored_fields(
        rows,
        [PRINTS[i] for i in order],
        [lengths[i] for i in order],
        [f"weighed.jsonl row {i}" for i in range(len(rows))],
        str(tmp_path / "weighed.jsonl"),
        weights,
    )
    return [next(iter(found.values())) for found in checked(fields)]


def test_weights_are_found_whatever_the_rows_order(store, tmp_path):
    at = store.fields.index("kl") * 10
    (a, b), (c, d) = read(tmp_path, [pointer(1), pointer(0)], order=(1, 0))
    assert [x.tolist() for x in (a, b, c, d)] == [[at + 2] * 4, [at + 3], [at] * 3, [at + 1] * 2]
    at = store.fields.index("calibrated_entropy") * 10
    ((a, b),) = read(tmp_path, [pointer(1)], order=(1,), weights="store:calibrated_entropy")
    assert [a.tolist(), b.tolist()] == [[at + 2] * 4, [at + 3]]


@pytest.mark.parametrize(
    ("row", "arguments", "says"),
    [
        ({}, {}, "no column 'token_weights'.*run launch.musc_token_weights"),
        ({COLUMN: [1.0, 2.0]}, {}, "not what launch.musc_token_weights writes"),
        (pointer(1, row="1"), {}, "not what launch.musc_token_weights writes"),
        (pointer(1, tokens="other"), {}, "made for other texts, another tokenizer"),
        (pointer(1), {"lengths": ((3, 2), (4, 2))}, r"4 and 1 tokens there, 4 and 2 here"),
        (pointer(1, key="0" * 16), {}, "is not the one that the row's weights were written to"),
        (pointer(1, row=2), {}, "is not the one that the row's weights were written to"),
        (pointer(1), {"weights": "store:pmi"}, "has no weights of pmi; it has calibrated_entropy, kl: "),
        (pointer(1, store="gone.weights"), {}, "gone.weights: no store there"),
    ],
)
def test_what_does_not_fit_is_refused(store, tmp_path, row, arguments, says):
    with pytest.raises(UserError, match=says) as caught:
        read(tmp_path, [pointer(0), row], **arguments)
    # The rule is asked of every row
    assert f"weighed.jsonl row {0 if 'pmi' in says else 1}" in str(caught.value) or "no store there" in says


def test_a_store_that_is_not_whole_is_refused(tmp_path):
    made = ScoreStore.create_or_open(str(tmp_path / "w.weights"), KEY, LENGTHS, ["kl"])
    made.write([0, 1], {"kl": [np.ones(3), np.ones(2)]})
    assert len(read(tmp_path, [pointer(0)], order=(0,))) == 1  # what is there can be read
    with pytest.raises(UserError, match="row 2 has no values yet"):
        read(tmp_path, [pointer(0), pointer(1)])


def test_rows_and_store_move_together(tmp_path):
    rows = str(tmp_path / "weighed.jsonl")
    assert store_as_written(str(tmp_path / "w.weights"), rows) == "w.weights"
    assert store_as_written(str(tmp_path / "deep" / "w"), rows) == "deep/w"
    assert store_as_written("/elsewhere/w", rows) == "/elsewhere/w"
    assert store_as_written("gs://b/x/w", "gs://b/x/rows.jsonl") == "w"
    assert store_as_written("gs://b/w", rows) == "gs://b/w"


def test_the_fingerprint_sees_texts_and_tokens():
    ids = array(1, 2, 3)
    prints = {
        pair_fingerprint("a", ids, ids[:2]),
        pair_fingerprint("b", ids, ids[:2]),
        pair_fingerprint([{"role": "user", "content": "a"}], ids, ids[:2]),
        pair_fingerprint("a", ids[:2], ids),
        pair_fingerprint("a", array(1, 2, 4), ids[:2]),
        pair_fingerprint("a", ids, array(1, 3)),
    }
    assert len(prints) == 6 and all(len(p) == 16 for p in prints)
    message = [{"content": "a", "role": "user"}]  # the order of the keys is no difference
    assert pair_fingerprint(message, ids, ids[:2]) in prints


def test_auto_takes_what_the_rows_bring():
    """A store was made on purpose, so it goes before scores that came with the rows."""
    plain, scored = (PreferenceRow(0, "0", "p", "c", "r", s, s) for s in (None, array(1)))
    pointing = pointer(0)
    assert rule_for("auto", [plain], [{}]) == "uniform"
    assert rule_for("auto", [plain], [{COLUMN: None}]) == "uniform"  # a column that Parquet filled
    assert rule_for("auto", [scored], [{}]) == "columns"
    assert rule_for("auto", [plain], [pointing]) == rule_for("auto", [scored], [pointing]) == "store"
    assert rule_for("columns", [scored], [pointing]) == "columns"
    assert rule_for("store:kl", [plain], [pointing]) == "store:kl"


def user(text):
    return [{"role": "user", "content": text}]


def perturbed(prompt, value, rules=("calibrated_entropy",)):
    row = PreferenceRow(7, "7", prompt, "c", "r", None, None)
    columns = {} if value is None else {"perturbed_prompt": value}
    return perturbed_of(row, columns, rules, "pairs.jsonl row 7")


def test_perturbed_prompts():
    assert perturbed("say", "said") == "said"
    assert perturbed(user("say"), user("said")) == user("said")
    # A plain string stands for the last user message, where instruction columns were read as messages too
    system, turn = {"role": "system", "content": "be"}, {"role": "assistant", "content": "yes"}
    prompt = [system, *user("first"), turn, *user("second")]
    assert perturbed(prompt, "2nd") == [system, *user("first"), turn, *user("2nd")]


@pytest.mark.parametrize(
    ("prompt", "value", "rules", "says"),
    [
        ("say", None, ("pmi", "kl"), "'perturbed_prompt' is missing, which the rule kl contrasts.*entropy, pmi"),
        ("say", user("said"), ("kl",), "must both be strings or both be messages"),
        ([{"role": "system", "content": "be"}], "said", ("kl",), "must both be strings or both be messages"),
        (user("say"), [], ("kl",), "perturbed_prompt is an empty list"),
        (user("say"), [{"role": "user"}], ("kl",), "perturbed_prompt message 0 has no content"),
        ("say", 5, ("kl",), "must both be strings or both be messages"),
    ],
)
def test_perturbed_prompts_that_do_not_fit(prompt, value, rules, says):
    with pytest.raises(UserError, match=says) as caught:
        perturbed(prompt, value, rules)
    assert str(caught.value).startswith("pairs.jsonl row 7: ")
