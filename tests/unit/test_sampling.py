"""The built-in generator: rows that depend on nothing around them, stops, budgets, and how little work it does."""

import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.checkpoints.runs import open_model
from lm_jax.config import ComputeConfig, DecodeConfig, MeshConfig
from lm_jax.data.tokenizers import load_tokenizer
from lm_jax.errors import UserError
from lm_jax.generation import sampling as sampler
from lm_jax.generation.requests import Request, SamplingConfig
from lm_jax.generation.sampling import LocalGenerator
from lm_jax.models.cache import CHUNK
from lm_jax.sharding import make_mesh
from tests.checkpoints import make_checkpoint, make_tokenizer

pytestmark = pytest.mark.usefixtures("optimized")

LETTERS = "bfgjklopqvxz"  # the tokenizer merges none of them: a letter is a token
ANCHOR = Request("anchor", "b" * 3 * CHUNK, 1)  # goes along, so that runs have the same shapes and compile once
CONTEXT = 128


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Parameters, their config, tokenizer and mesh."""
    directory = tmp_path_factory.mktemp("model")
    make_checkpoint(directory, "llama", max_position_embeddings=512)
    make_tokenizer(directory)
    source, mesh = open_model(str(directory)), make_mesh(MeshConfig(1, 1, 1))
    return source.load_params(mesh, "float32"), source.config, load_tokenizer(str(directory)), mesh


@pytest.fixture(scope="module")
def generator(parts):
    """generator(slots, chunk, max_length, params): one over the tiny model."""
    params, config, tokenizer, mesh = parts

    def make(slots=8, chunk=4, max_length=CONTEXT, params=params, end_ids=(0,)):
        decode = DecodeConfig(slots, max_length, chunk)
        return LocalGenerator(params, config, tokenizer, end_ids, ComputeConfig("float32"), decode, mesh)

    return make


@pytest.fixture(scope="module")
def walker(parts, generator):
    """walker(*scripts): a generator that, without attention, follows every token by the next one of its script."""
    params, config, tokenizer, _ = parts

    def make(*scripts, **options):
        follower = np.arange(config.vocab_size)
        for script in scripts:
            ids = script if isinstance(script, list) else tokenizer(script)["input_ids"]
            assert len(set(ids[:-1])) == len(ids) - 1, "a token has one follower"
            follower[ids[:-1]] = ids[1:]
        embedding = np.random.default_rng(0).normal(size=(config.vocab_size, config.d_model)).astype(np.float32)
        embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
        head = np.zeros_like(embedding)
        np.add.at(head, follower, 20 * embedding)
        layers = jax.tree.map(jnp.zeros_like, params["layers"])
        walking = params | {
            "embed": {"embedding": jnp.asarray(embedding)},
            "layers": layers,
            "final_norm": jax.tree.map(jnp.ones_like, params["final_norm"]),
            "lm_head": {"kernel": jnp.asarray(head)},
        }
        walking = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), walking, params)
        return generator(params=walking, **options)

    return make


def letters(number, seed):
    return "".join(random.Random(seed).choices(LETTERS, k=number))


def answers(gen, requests, **fields):
    """{id: completion}, each exactly once, without the anchor's."""
    fields = {"max_new_tokens": 24, **fields}
    found = {}
    for done in gen.generate([ANCHOR, *requests], SamplingConfig(**fields)):
        assert done
        for completion in done:
            assert completion.id not in found
            found[completion.id] = completion
    assert set(found) == {"anchor", *(r.id for r in requests)}
    assert found.pop("anchor").error is None
    return found


def tokens(found):
    return {i: [(s.token_ids, s.text, s.finish_reason) for s in c.samples] for i, c in found.items()}


def only(found):
    (completion,) = found.values()
    (sample,) = completion.samples
    return sample


@pytest.fixture
def counted(monkeypatch):
    """Calls of the compiled steps: name -> their arguments."""
    calls = {name: [] for name in ("prefill", "place", "decode")}
    for name, log in calls.items():
        real = getattr(sampler, name)
        monkeypatch.setattr(sampler, name, lambda *a, real=real, log=log: log.append(a) or real(*a))
    return calls


# --- a row depends on its id, the seed and the model alone -----------------------------------------------------------

ROWS = [Request(f"r{i}", letters(1 + 7 * i % 90, i)) for i in range(20)]
SHARED = letters(70, 99)


@pytest.fixture(scope="module")
def expected(generator):
    found = answers(generator(), ROWS)
    assert len({c.samples[0].text for c in found.values()}) == len(ROWS)
    return found


def assert_same(found, expected):
    assert tokens(found) == {i: tokens(expected)[i] for i in found}
    for i, completion in found.items():
        for a, b in zip(completion.samples, expected[i].samples, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("slots", "chunk"), [(1, 4), (3, 5), (64, 16)])
def test_slots_and_chunks_change_nothing(generator, expected, slots, chunk):
    assert_same(answers(generator(slots, chunk), ROWS), expected)


def test_order_and_neighbours_change_nothing(generator, expected):
    gen = generator()
    assert_same(answers(gen, ROWS[::-1]), expected)
    assert_same(answers(gen, ROWS[3::4]), expected)  # as after a restart
    assert_same(answers(gen, ROWS[7:8]), expected)
    beside = [Request(f"s{i}", SHARED + letters(1 + i, i)) for i in range(20)]
    found = answers(gen, [*beside[:10], *ROWS, *beside[10:]])
    assert_same({i: c for i, c in found.items() if i.startswith("r")}, expected)
    assert_same({i: c for i, c in found.items() if i.startswith("s")}, answers(gen, beside[::-3]) | found)


def test_a_restart_may_have_other_shapes(generator, expected):
    """Without the longest prompts: caches are shorter, their blocks the same."""
    rows = [r for r in ROWS if len(r.prompt) <= 32]
    found = [c for done in generator().generate(rows, SamplingConfig(24)) for c in done]
    assert_same({c.id: c for c in found}, expected)
    assert len(found) == len(rows) > 3


def test_number_of_samples_changes_none_of_them(generator, expected):
    gen = generator()
    three, five = (answers(gen, ROWS, num_samples=n) for n in (3, 5))
    for i, completion in five.items():
        assert tokens(three)[i] == tokens(five)[i][:3]
        assert tokens(expected)[i] == tokens(five)[i][:1]
        assert len({s.token_ids for s in completion.samples}) == 5


def test_seeds_and_ids_decide(generator, expected):
    gen = generator()
    other, before = tokens(answers(gen, ROWS, seed=1)), tokens(expected)
    assert not any(other[i] == before[i] for i in before)
    same = [Request(f"x{i}", "qq") for i in range(12)]
    found = answers(gen, same)
    assert len({s.token_ids for c in found.values() for s in c.samples}) == 12
    greedy = answers(gen, same, temperature=0.0)
    assert len({s.token_ids for c in greedy.values() for s in c.samples}) == 1


def test_runs_side_by_side(generator, expected):
    """Two runs whose results are read by turns, and one that nobody reads to the end."""
    gen = generator()
    empty = jax.sharding.get_abstract_mesh()
    assert empty.empty
    abandoned = gen.generate([ANCHOR, *ROWS], SamplingConfig(24, seed=5))
    next(abandoned)
    assert jax.sharding.get_abstract_mesh() == empty, "the caller's code would run with the generator's mesh"
    runs = [gen.generate([ANCHOR, *ROWS], SamplingConfig(24)) for _ in range(2)]
    found = [{}, {}]
    for turn in itertools.zip_longest(*runs, fillvalue=()):
        for each, done in zip(found, turn, strict=True):
            each |= {c.id: c for c in done}
    abandoned.close()
    assert jax.sharding.get_abstract_mesh() == empty
    for each in found:
        each.pop("anchor", None)
        assert_same(each, expected)
    assert_same(answers(gen, ROWS), expected)


# --- how much work it is ---------------------------------------------------------------------------------------------


def test_compiles_once(generator):
    """Many rows through few slots; the shapes are this test's own."""
    gen = generator(slots=5, chunk=3)
    rows = [Request(f"r{i}", letters(1 + i, i)) for i in range(2 * CHUNK)]
    steps = (sampler.prefill, sampler.place, sampler.decode)
    before = [step._cache_size() for step in steps]
    found = [c for done in gen.generate(rows, SamplingConfig(9)) for c in done]
    assert len(found) == len(rows) and not any(c.error for c in found)
    assert [step._cache_size() - n for step, n in zip(steps, before, strict=True)] == [1, 1, 1]


def test_samples_share_one_prefill(generator, counted):
    found = answers(generator(), ROWS[:5], num_samples=6, max_new_tokens=5)
    assert all(len(c.samples) == 6 for c in found.values())
    assert len(counted["prefill"]) == 1


def chunks_run(calls):
    return [int((lengths.max() - 1) // CHUNK + 1 - first) for _, _, _, lengths, first, *_ in calls]


def test_a_shared_beginning_is_prefilled_once(generator, counted):
    """40 rows behind the same 10 chunks, among others: as one row at a time, but for the work."""
    gen = generator(max_length=416)
    beginning = letters(10 * CHUNK + 5, 0)
    rows = [Request(f"r{i}", beginning + letters(20 + i % 7, i)) for i in range(40)]
    found = {c.id: c for done in gen.generate(rows, SamplingConfig(8)) for c in done}
    assert chunks_run(counted["prefill"]) == [11, 1, 1]
    assert len(found) == 40
    one = {}
    for row in rows[::9]:
        one |= {c.id: c for done in gen.generate([row], SamplingConfig(8)) for c in done}
    assert chunks_run(counted["prefill"])[3:] == [11] * 5
    assert_same(one, found)


def test_slots_are_refilled(walker, counted):
    """One long row among every four: static batches would wait for it each time."""
    gen = walker([10, 10], slots=4, chunk=2, end_ids=())
    limits = [28, 2, 2, 2] * 8
    rows = [Request(f"r{i}", "q", limit) for i, limit in enumerate(limits)]
    found = answers(gen, rows, temperature=0.0, max_new_tokens=28)
    assert [c.samples[0].num_tokens for c in (found[r.id] for r in rows)] == limits
    assert {c.samples[0].finish_reason for c in found.values()} == {"length"}
    static = 8 * 28 // 2
    least = sum(limits) / 4 / 2
    assert least <= len(counted["decode"]) <= least + 28 / 2 < 0.5 * static
    # Nothing beyond what was asked for is kept, and a slot is never looked at more often than needed
    assert sum(len(c.samples[0].token_ids) for c in found.values()) == sum(limits)


@pytest.mark.parametrize("number", [0, 1, 7, 8, 9, 40])
def test_every_request_is_answered_once(generator, number):
    found = answers(generator(), [Request(f"r{i}", letters(1 + i, i)) for i in range(number)], max_new_tokens=3)
    assert not any(c.error for c in found.values())


# --- where a response ends -------------------------------------------------------------------------------------------

SCRIPT = "qbéx日y the end"  # each byte follows one other; "the", " the" and more are whole tokens


def test_budgets(walker):
    gen = walker([10, 10], end_ids=(), max_length=100)
    long = "b" * 96
    rows = [Request("none", "q"), Request("three", "q", 3), Request("more", "q", 99), Request("context", long)]
    found = answers(gen, rows, temperature=0.0)
    got = {i: (c.samples[0].num_tokens, c.samples[0].finish_reason) for i, c in found.items()}
    assert got == {"none": (24, "length"), "three": (3, "length"), "more": (24, "length"), "context": (4, "length")}
    assert all(len(c.samples[0].token_ids) == len(c.samples[0].logprobs) == got[i][0] for i, c in found.items())


@pytest.fixture(scope="module")
def script_ids(parts):
    return parts[2](SCRIPT)["input_ids"]


def test_end_token_is_left_out(walker, script_ids):
    sample = only(answers(walker([*script_ids, 0]), [Request("r", "q")], temperature=0.0))
    assert (sample.text, sample.finish_reason, sample.token_ids) == (SCRIPT[1:], "stop", (*script_ids[1:], 0))
    assert sample.num_tokens == len(script_ids) == len(sample.logprobs)
    # The last token allowed is the end token: it ended, it was not cut
    limited = only(answers(walker([*script_ids, 0]), [Request("r", "q", len(script_ids))], temperature=0.0))
    assert limited == sample
    cut = only(answers(walker([*script_ids, 0]), [Request("r", "q", len(script_ids) - 1)], temperature=0.0))
    assert (cut.text, cut.finish_reason) == (SCRIPT[1:], "length")


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (("b",), ""),  # at once
        (("bé",), ""),
        (("é",), "b"),  # two tokens
        (("日",), "béx"),  # three
        (("éx日",), "b"),
        (("y t",), "béx日"),  # through the middle of " the"
        (("he",), "béx日y t"),
        (("日y", "x"), "bé"),  # whichever comes first
        (("nowhere", "end"), "béx日y the "),
        (("he e", "the"), "béx日y "),
        (("nowhere",), SCRIPT[1:]),
    ],
)
@pytest.mark.parametrize("chunk", [4, 1, 16])
def test_stop_texts(walker, parts, script_ids, stop, text, chunk):
    sample = only(answers(walker([*script_ids, 0], chunk=chunk), [Request("r", "q")], temperature=0.0, stop=stop))
    assert (sample.text, sample.finish_reason) == (text, "stop")
    # As few tokens as hold the stop
    decode = parts[2].decode
    holding = (n for n in range(len(script_ids)) if any(s in decode(script_ids[1 : n + 1]) for s in stop))
    count = next(holding, len(script_ids))
    assert sample.num_tokens == count == len(sample.logprobs)
    assert sample.token_ids == (*script_ids[1:], 0)[:count]


def test_a_slot_is_free_after_a_stop(walker, script_ids):
    """A row that a text ended must not go on in the next row's place."""
    gen = walker([*script_ids, 0], slots=8)
    found = answers(gen, [Request(f"r{i}", "q") for i in range(30)], temperature=0.0, stop=("x",))
    assert {s.text for c in found.values() for s in c.samples} == {"bé"}


def test_stop_tokens(walker, parts, script_ids):
    gen = walker([*script_ids[:4], 1, *script_ids[4:], 0])  # 1 is <|im_start|>
    free = only(answers(gen, [Request("r", "q")], temperature=0.0))
    assert free.text == SCRIPT[1:] and 1 in free.token_ids  # special tokens leave no text
    for stop in (1, "<|im_start|>"):
        sample = only(answers(gen, [Request("r", "q")], temperature=0.0, stop=(stop,)))
        assert (sample.text, sample.finish_reason, sample.token_ids) == ("bé", "stop", (*script_ids[1:4], 1))
    x = script_ids[4]
    sample = only(answers(gen, [Request("r", "q")], temperature=0.0, stop=(x, "nowhere")))
    assert (sample.text, sample.finish_reason, sample.token_ids) == ("bé", "stop", (*script_ids[1:4], 1, x))


@pytest.mark.parametrize("stop", ["<|nope|>", 320, -1])
def test_unknown_stop_tokens(generator, stop):
    with pytest.raises(UserError, match="config.stop"):
        next(generator().generate([ANCHOR], SamplingConfig(4, stop=(stop,))))


# --- prompts that cannot be answered ---------------------------------------------------------------------------------


def test_bad_prompts_stop_no_others(generator, expected):
    bad = {
        "empty": "",
        "blank": " \n ",
        "nothing": None,
        "number": 7,
        "no-messages": [],
        "no-content": [{"role": "user"}],
        "long": "b" * CONTEXT,
        "surrogate": "b\ud800",
    }
    requests = [Request(i, prompt) for i, prompt in bad.items()]
    found = answers(generator(), [*ROWS[:10], *requests, *ROWS[10:]])
    for i in bad:
        assert found[i].samples == () and f"row {i}" in found[i].error and "\n" not in found[i].error
    assert_same({r.id: found[r.id] for r in ROWS}, expected)
    only_bad = [c for done in generator().generate(requests, SamplingConfig(4)) for c in done]
    assert {c.id: c.error for c in only_bad} == {i: found[i].error for i in bad}


def test_longest_prompt_that_fits(generator):
    found = answers(generator(max_length=97), [Request("r", "b" * 96), Request("s", "b" * 97)])
    assert only({"r": found["r"]}).finish_reason == "length" and found["r"].samples[0].num_tokens == 1
    assert "97" in found["s"].error


def test_messages(generator, parts):
    """Through the chat template, as the same text by hand."""
    chat = [{"role": "user", "content": "qq"}]
    text = "<|im_start|>user\nqq<|im_end|>\n<|im_start|>assistant\n"
    by_chat, by_hand = (answers(generator(), [Request("r", prompt)]) for prompt in (chat, text))
    assert tokens(by_chat) == tokens(by_hand)


def test_repetition_penalty(walker, parts, script_ids):
    """Nothing twice, prompt included, where the penalty is prohibitive; rows' own tokens only."""
    gen = walker([*script_ids[:6], script_ids[0]])
    rows = [Request("r", "q"), Request("s", "q" + "b"), Request("t", letters(40, 3) + "q")]
    free = answers(gen, rows, temperature=0.0)
    assert len(set(free["r"].samples[0].token_ids)) == 6  # a circle
    found = answers(gen, rows, temperature=0.0, repetition_penalty=1e6)
    for row in rows:
        ids = [*parts[2](row.prompt)["input_ids"], *found[row.id].samples[0].token_ids]
        new = ids[len(row.prompt) :]
        assert len(set(new)) == len(new) and not set(new) & set(ids[: len(row.prompt)])
    assert found["r"].samples[0].token_ids[0] == script_ids[1] != found["t"].samples[0].token_ids[0]


def test_logprobs_do_not_depend_on_how_tokens_are_chosen(generator):
    """The same tokens drawn from filters that keep all have the same log-probs."""
    plain = answers(generator(), ROWS[:6])
    filtered = answers(generator(), ROWS[:6], top_k=319, temperature=1.0)
    same = [i for i in plain if tokens(plain)[i] == tokens(filtered)[i]]
    assert len(same) >= 5  # the unlikeliest token may be missed
    for i in same:
        np.testing.assert_allclose(plain[i].samples[0].logprobs, filtered[i].samples[0].logprobs, atol=1e-5)


def test_samples_are_whole(expected):
    for completion in expected.values():
        (sample,) = completion.samples
        assert sample.num_tokens == len(sample.token_ids) == len(sample.logprobs) <= 24
        assert (sample.finish_reason == "stop") == (sample.token_ids[-1] == 0)
        assert all(p <= 0 for p in sample.logprobs)
        assert 0 not in sample.token_ids[:-1]


def test_stop_texts_wait_for_the_end_of_thoughts(walker):
    """Every `g` ends the response, unless it stands in the thoughts that the prompt opened."""
    thinks, stop = walker("\nfgj[/x]kg"), SamplingConfig(20, 0.0, stop=("g",))
    prompts = {"opened": "b[x]\n", "closed": "b[x][/x]\n"}
    asked = [Request(f"{name} {end}", text, think_end=end) for name, text in prompts.items() for end in ("", "[/x]")]
    found = {c.id: c.samples[0] for batch in thinks.generate(asked, stop) for c in batch}
    assert {name: sample.text for name, sample in found.items()} == {
        "opened ": "f",
        "opened [/x]": "fgj[/x]k",
        "closed ": "f",
        "closed [/x]": "f",
    }
    assert all(sample.finish_reason == "stop" for sample in found.values())


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {}, {"top_k": 40, "top_p": 0.9, "temperature": 1.5}])
def test_ids_without_a_token_are_never_drawn(parts, generator, fields):
    """Of a padded vocabulary, however likely its last rows are."""
    params, config, tokenizer, _ = parts
    kernel = np.array(params["lm_head"]["kernel"])
    kernel[len(tokenizer) :] *= 5
    gen = generator(params=params | {"lm_head": {"kernel": jnp.asarray(kernel)}})
    done = list(gen.generate([Request(str(i), "what is") for i in range(12)], SamplingConfig(20, **fields)))
    drawn = [i for group in done for c in group for sample in c.samples for i in sample.token_ids]
    assert len(drawn) > 100 and max(drawn) < len(tokenizer) < config.vocab_size
