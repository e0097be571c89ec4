"""Every weight rule is a plain numpy computation from transformers + torch logits, token by token."""

import hashlib
import json

import numpy as np
import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

from lm_jax.config import BatchConfig, ComputeConfig, MeshConfig
from lm_jax.data.packing import example_lengths, fill_rows, pack
from lm_jax.data.score_store import ScoreStore
from lm_jax.data.text import TextEncoder
from lm_jax.data.tokenizers import load_tokenizer
from musc_jax.training.examples import load_pairs
from musc_jax.training.reference import no_scores, weighted_pairs
from musc_jax.weights.command import WeighConfig, weigh_rows
from musc_jax.weights.rules import WEIGHING_RULES
from tests.checkpoints import make_checkpoint, make_tokenizer
from tests.e2e.common import read_rows, write_rows

MAX_LENGTH = 40
SEED = 3
LONG = " cat hat mat 0123456789" * 3  # cut at max_length, under the full prompt


def user(text):
    return [{"role": "user", "content": text}]


STRINGS = [
    {"id": "a", "prompt": "say the cat\n", "perturbed_prompt": "say\n", "chosen": "the cat", "rejected": "a dog, then"},
    {
        "id": "b",
        "prompt": "what\n",
        "perturbed_prompt": "what is this and that\n",
        "chosen": "x" + LONG,
        "rejected": "y",
    },
    {"id": "c", "prompt": "no more than this\n", "perturbed_prompt": "more\n", "chosen": "z", "rejected": "q" + LONG},
    {"id": "d", "prompt": "the same\n", "perturbed_prompt": "the same\n", "chosen": "this", "rejected": "and that"},
]
# The system message stays under the perturbed instruction and goes under none; a plain string stands for the last turn
CHAT = [
    {
        "id": row["id"],
        "prompt": [{"role": "system", "content": "be"}, *user(row["prompt"])]
        if row["id"] == "a"
        else user(row["prompt"]),
        "perturbed_prompt": row["perturbed_prompt"] if row["id"] == "a" else user(row["perturbed_prompt"]),
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for row in STRINGS
]
CASES = {"llama-strings": STRINGS, "llama-chat": CHAT, "qwen2-strings": STRINGS, "qwen2-chat": CHAT}


def make(path, family):
    """(torch model, tokenizer); Llama's sets a token before raw text, Qwen2's does not."""
    model = make_checkpoint(path, family, vocab_size=304)
    tokenizer = make_tokenizer(path)
    if family == "llama":
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
        tokenizer.save_pretrained(path)
    return model, transformers.AutoTokenizer.from_pretrained(path)


def settings(path, rows, **changes):
    """A config that weighs `rows` with the model at `path`, by all rules."""
    given = {
        "model": str(path),
        "input": write_rows(path / "pairs.jsonl", rows),
        "output": str(path / "weighed.jsonl"),
        "store": None,
        "rules": "all",
        "keep_scores": True,
        "seed": SEED,
        "dtype": "float32",
        "max_length": MAX_LENGTH,
        "batch": BatchConfig(2, 160),
        "mesh": MeshConfig(1, 1, 1),
        "compute": ComputeConfig("float32", logprob_chunk=8),
    }
    return WeighConfig(**{**given, **changes})


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(rows, torch model, tokenizer, store, directory)."""
    path = tmp_path_factory.mktemp(request.param)
    model, tokenizer = make(path, request.param.split("-")[0])
    rows = CASES[request.param]
    weigh_rows(settings(path, rows))
    return rows, model, tokenizer, ScoreStore.open(str(path / "weighed.weights")), path


def ids(tokenizer, prompt, response=None):
    """Token ids as a reader of the README would make them, without our code."""
    if isinstance(prompt, str):
        start = tokenizer(prompt)["input_ids"]
        return start if response is None else start + tokenizer(response, add_special_tokens=False)["input_ids"] + [0]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    start = tokenizer(text, add_special_tokens=False)["input_ids"]
    if response is None:
        return start
    return start + tokenizer(response[0]["content"], add_special_tokens=False)["input_ids"] + [0]


def oracle(model, tokenizer, row, side, max_length=MAX_LENGTH):
    """Of one response: its token ids, and float64 log-distributions [R, V] under each context."""
    prompt, perturbed = row["prompt"], row["perturbed_prompt"]
    if isinstance(perturbed, str) and not isinstance(prompt, str):
        perturbed = [*prompt[:-1], *user(perturbed)]
    full = ids(tokenizer, prompt)
    response = ids(tokenizer, prompt, row[side])[len(full) : max_length]
    none = ids(tokenizer, user("")) if not isinstance(prompt, str) else ids(tokenizer, "") or [0]
    contexts = {"full": full, "perturbed": ids(tokenizer, perturbed), "none": none}
    out = {}
    for name, start in contexts.items():
        with torch.no_grad():
            logits = model(torch.tensor([start + response])).logits[0].double()
        out[name] = torch.log_softmax(logits, -1).numpy()[len(start) - 1 : -1]
    return np.array(response), out


def to_mean_1(values):
    return np.clip(values / values.mean(), 0, 2) if abs(values.mean()) > 1e-6 else np.ones(len(values))


def expected_weights(response, logp, side, row_id):
    """The rules, written out."""
    at = np.arange(len(response))
    own = {name: values[at, response] for name, values in logp.items()}
    h = {name: -(np.exp(values) * values).sum(-1) for name, values in logp.items()}
    kl = (np.exp(logp["full"]) * (logp["full"] - logp["perturbed"])).sum(-1)
    reverse = (np.exp(logp["perturbed"]) * (logp["perturbed"] - logp["full"])).sum(-1)
    calibrated = np.clip(1.2 * h["full"] / h["perturbed"], 0, 2)
    ratio = h["perturbed"] / h["full"] if side == "chosen" else h["full"] / h["perturbed"]

    def place(i):
        return int.from_bytes(
            hashlib.sha256(json.dumps([SEED, row_id, side, "weights", i]).encode()).digest()[:8], "big"
        )

    weights = {
        "calibrated_entropy": calibrated,
        "other_over_own": np.clip(1.2 * ratio, 0, 2),
        "uniform": np.ones(len(response)),
        "perplexity": to_mean_1(-own["full"]),
        "entropy": to_mean_1(h["full"]),
        "kl": to_mean_1(kl),
        "symmetric_kl": to_mean_1(kl + reverse),
        "pmi": to_mean_1(np.maximum(own["full"] - own["none"], 0)),
        "shuffled": calibrated[sorted(at, key=lambda i: place(int(i)))],
    }
    scores = {f"logprob_{name}": values for name, values in own.items()}
    return weights, scores | {f"entropy_{name}": values for name, values in h.items()}


def responses(case):
    """(pair, row, side, number in the store) of every response."""
    return [(i, row, side, 2 * i + s) for i, row in enumerate(case[0]) for s, side in enumerate(("chosen", "rejected"))]


def test_every_rule_equals_torch(case):
    _, model, tokenizer, store, _ = case
    assert store.missing().size == 0 and set(WEIGHING_RULES) < set(store.fields)
    apart = dict.fromkeys(WEIGHING_RULES, 0.0)
    for _, row, side, number in responses(case):
        response, logp = oracle(model, tokenizer, row, side)
        weights, scores = expected_weights(response, logp, side, row["id"])
        assert set(weights) == set(WEIGHING_RULES) and set(weights) | set(scores) == set(store.fields)
        found = store.read([number])
        for name, values in (weights | scores).items():
            np.testing.assert_allclose(found[name][0], values, rtol=0, atol=1e-4, err_msg=f"{row['id']} {side} {name}")
        for name, values in weights.items():
            assert found[name][0].dtype == np.float32 and 0 <= found[name][0].min() <= found[name][0].max() <= 2
            apart[name] = max([apart[name], *np.abs(np.diff(values))])
    # One token late would be seen, in every rule that has more than one value
    assert all(distance > 0.05 for name, distance in apart.items() if name != "uniform"), apart


def test_truncated_responses_keep_the_tokens_of_training(case):
    """The row whose response is cut has a perturbed prompt longer (b) and shorter (c) than the full one."""
    rows, model, tokenizer, store, path = case
    pairs = load_pairs(str(path / "pairs.jsonl"), TextEncoder(load_tokenizer(str(path)), MAX_LENGTH), "uniform")
    cut = []
    for i, row, side, number in responses(case):
        trained = pairs.segments[number]
        response, _ = oracle(model, tokenizer, row, side)
        np.testing.assert_array_equal(trained.response, response)
        assert store.lengths[number] == len(response)
        if response[-1] != 0:
            assert len(trained) == MAX_LENGTH
            cut.append((rows[i]["id"], side))
    assert cut == [("b", "chosen"), ("c", "rejected")]


def test_a_perturbed_prompt_that_is_the_prompt(case):
    """Nothing to contrast: 1.2 from the ratios, 1 from the divergences."""
    *_, store, _ = case
    found = store.read([6, 7])
    for number in (0, 1):
        np.testing.assert_allclose(found["calibrated_entropy"][number], 1.2, atol=1e-5)
        np.testing.assert_allclose(found["other_over_own"][number], 1.2, atol=1e-5)
        np.testing.assert_array_equal(found["kl"][number], 1)
        np.testing.assert_array_equal(found["symmetric_kl"][number], 1)


def test_one_context_pair_or_three_give_the_same(case):
    """A rule alone, in a pass over fewer contexts and other batches, weighs as beside all others."""
    rows, *_, store, path = case
    everything = store.read(np.arange(len(store.lengths)))
    for rule, shape in (
        ("pmi", (3, 90)),
        ("symmetric_kl", (1, 200)),
        ("calibrated_entropy", (2, 90)),
    ):
        changes = {"rules": rule, "keep_scores": False, "batch": BatchConfig(*shape)}
        weigh_rows(settings(path, rows, store=str(path / rule), output=str(path / f"{rule}.jsonl"), **changes))
        alone = ScoreStore.open(str(path / rule))
        assert alone.fields == (rule,)
        for a, b in zip(alone.read(np.arange(len(store.lengths)))[rule], everything[rule], strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_only_the_first_tokens_weight_differs(family, tmp_path):
    """A model that sees nothing but the last token, and instructions that differ in their last token.

    Then only the distribution of a response's first token depends on the instruction. Its weight must stand at the
    response's token 0, in the store and where training predicts that token; one position off is somewhere else.
    """
    model, tokenizer = make(tmp_path, family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        model.lm_head.weight.mul_(2)  # entropies further apart
    model.save_pretrained(tmp_path)
    rows = [
        {
            "id": str(n),
            "prompt": f"{n} say A",
            "perturbed_prompt": f"{n} say and this B",
            "chosen": c,
            "rejected": "! no",
        }
        for n, c in ((1, " the hat"), (22, " what is this, and that?"), (333, " cat"))
    ]
    weigh_rows(settings(tmp_path, rows, rules="calibrated_entropy,kl"))
    pairs = load_pairs(str(tmp_path / "weighed.jsonl"), TextEncoder(load_tokenizer(str(tmp_path)), MAX_LENGTH), "auto")
    assert pairs.rule == "store"
    for number, segment in enumerate(pairs.segments):
        row, side = rows[number // 2], ("chosen", "rejected")[number % 2]
        expected, _ = expected_weights(*oracle(model, tokenizer, row, side), side, row["id"])
        assert abs(expected["calibrated_entropy"][0] - 1.2) > 0.05
        np.testing.assert_allclose(segment.values["weights"][0], expected["calibrated_entropy"][0], atol=1e-4)
        np.testing.assert_allclose(segment.values["weights"][1:], 1.2, atol=1e-4)
        kl = ScoreStore.open(str(tmp_path / "weighed.weights")).read([number])["kl"][0]
        assert kl[0] == 2 and (kl[1:] < 1e-3).all()  # all of the divergence
    examples = weighted_pairs(pairs.segments, no_scores(pairs.segments), pairs.rule)
    packed = pack(example_lengths(examples), 160, 4)
    batch = fill_rows(packed, examples, 160, 4, ("weights", "ref_logprobs"))
    special = (batch["loss_mask"] > 0) & (np.abs(batch["weights"] - 1.2) > 0.01)
    firsts = sorted(int(segment.response[0]) for segment in pairs.segments)
    assert sorted(batch["targets"][special].tolist()) == firsts
    # Where that token is predicted: the last token of the prompt
    assert set(batch["tokens"][special]) == {int(segment.prompt[-1]) for segment in pairs.segments}


def test_the_rows_are_kept_and_point_at_their_weights(case):
    rows, *_, store, path = case
    written = read_rows(path / "weighed.jsonl")
    assert [{k: v for k, v in row.items() if k != "token_weights"} for row in written] == rows
    for i, row in enumerate(written):
        pointer = row["token_weights"]
        assert pointer["store"] == "weighed.weights" and pointer["row"] == i
        assert pointer["rule"] == "calibrated_entropy"
