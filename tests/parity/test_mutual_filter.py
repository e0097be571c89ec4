"""The filter's numbers are those of transformers + torch, one text at a time, by chat template or as raw text."""

import runpy

import numpy as np
import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

from lm_jax.checkpoints.runs import open_model
from lm_jax.config import BatchConfig, ComputeConfig, MeshConfig, from_config_dict
from lm_jax.data.packing import Segment
from lm_jax.scoring.scoring import score
from lm_jax.sharding import make_mesh
from main_jax.filter.command import FilterConfig, filter_candidates
from tests.checkpoints import make_checkpoint, make_tokenizer
from tests.conftest import ROOT
from tests.e2e.common import read_rows, write_rows

ROWS = [
    {
        "id": f"r{i // 3}",
        "response": f"the cat {i // 3} sat on the hat and the mat, then 0123456789"[: 9 + 6 * (i // 3)],
        "instruction": f"say what the cat {i} did " + "and that " * (i % 4),
    }
    for i in range(15)
]
WORDS = {
    "synthetic_system": "web",
    "reverse_question": "what is this?\n{response}",
    "forward_text": "{system}\nask: {instruction}\nsay: ",
    "reverse_text": "{system}say: {response}\nask: ",
}
FORWARD, REVERSE = 0, 1


def make_models(path, family):
    """Two torch models of different weights, and their tokenizer."""
    models = []
    for name, seed in (("forward", 0), ("reverse", 1)):
        models.append(make_checkpoint(path / name, family, seed=seed, vocab_size=304, max_position_embeddings=256))
        tokenizer = make_tokenizer(path / name)
        if family == "llama":  # sets a token before raw text
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
            )
            tokenizer.save_pretrained(path / name)
    return models, transformers.AutoTokenizer.from_pretrained(path / "forward")


def settings(path, **changes) -> FilterConfig:
    config = runpy.run_path(str(ROOT / "configs" / "main_filter.py"))["get_config"]("tiny")
    config.update(
        forward=str(path / "forward"),
        reverse=str(path / "reverse"),
        input=write_rows(path / "candidates.jsonl", ROWS),
        output=str(path / "kept.jsonl"),
        max_length=160,
    )
    config.prompts.update(WORDS)
    config.batch.update(rows=2, row_length=192)
    config.update(changes)
    return from_config_dict(FilterConfig, config.to_dict())


def cross_entropy(model, tokenizer, prompt, response) -> float:
    """Of the response with its end token, by one plain forward pass."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt, add_special_tokens=True)["input_ids"]
    else:
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    wanted = tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([ids + wanted])).logits[0, len(ids) - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits.double(), torch.tensor(wanted)))


def prompt(format, direction, text):
    if format == "text":
        return f"web\nask: {text}\nsay: " if direction == FORWARD else f"say: {text}\nask: "
    if direction == FORWARD:
        return [{"role": "system", "content": "web"}, {"role": "user", "content": text}]
    return [{"role": "user", "content": f"what is this?\n{text}"}]


@pytest.mark.parametrize(("family", "format"), [("llama", "messages"), ("qwen2", "messages"), ("llama", "text")])
def test_scores_equal_transformers(tmp_path, family, format):
    models, tokenizer = make_models(tmp_path, family)
    config = settings(tmp_path)
    filter_candidates(config if format == "messages" else settings(tmp_path, prompts={**WORDS, "format": "text"}))
    found = read_rows(tmp_path / "kept.jsonl.candidates.jsonl")
    expected = []
    for row in ROWS:
        response, instruction = row["response"], row["instruction"].strip()
        forward = cross_entropy(models[FORWARD], tokenizer, prompt(format, FORWARD, instruction), response)
        alone = cross_entropy(models[FORWARD], tokenizer, prompt(format, FORWARD, ""), response)
        reverse = cross_entropy(models[REVERSE], tokenizer, prompt(format, REVERSE, response), instruction)
        expected.append(
            {
                "forward": forward,
                "reverse": reverse,
                "mutual": forward + reverse,
                "forward_gain": forward - alone,
                "mutual_gain": forward - alone + reverse,
                "response_alone": alone,
            }
        )
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["scores"] == pytest.approx(theirs, abs=1e-4)
    # What is kept, chosen from torch's numbers: of each of the 5 responses the best candidate, of these the best half
    gains = np.array([e["mutual_gain"] for e in expected]).reshape(5, 3)
    best = {3 * r + int(gains[r].argmin()): gains[r].min() for r in range(5)}
    kept = sorted(sorted(best, key=best.get)[:3])
    assert [i for i, row in enumerate(found) if row["kept"]] == kept
    rows = read_rows(tmp_path / "kept.jsonl")
    for number, row in zip(kept, rows, strict=True):
        asked = prompt(format, FORWARD, ROWS[number]["instruction"].strip())
        answer = ROWS[number]["response"]
        if format == "text":
            assert (row["prompt"], row["response"]) == (asked, answer) and "messages" not in row
        else:
            assert row["messages"] == [*asked, {"role": "assistant", "content": answer}]
        assert row["id"] == ROWS[number]["id"] and row["weight"] == 1 and row["source"] == "synthetic"


def test_scoring_without_entropies_and_of_some_batches(tmp_path):
    make_checkpoint(tmp_path, "qwen2")
    mesh, compute = make_mesh(MeshConfig(1, -1, 1)), ComputeConfig("float32", logprob_chunk=16)
    source = open_model(str(tmp_path))
    params = source.load_params(mesh, "float32")
    random = np.random.default_rng(0)
    segments = [
        Segment(*(random.integers(0, 320, size).astype(np.int32) for size in random.integers(1, 20, 2)))
        for _ in range(40)
    ]
    batch = BatchConfig(rows=2, row_length=64)

    def scored(**options):
        groups = score(params, segments, source.config, compute, batch, mesh, **options)
        return [{s.row: s for s in group} for group in groups]

    full, plain = scored(), scored(with_entropies=False)
    assert [list(g) for g in full] == [list(g) for g in plain] and len(full) > 5
    for group, without in zip(full, plain, strict=True):
        for row, s in group.items():
            np.testing.assert_allclose(without[row].logprobs, s.logprobs, rtol=0, atol=1e-5)
            assert without[row].entropies is None and s.entropies.shape == s.logprobs.shape
    wanted = np.zeros(40, bool)
    wanted[[*plain[1]][0]] = wanted[[*plain[4]][-1]] = True
    some = scored(with_entropies=False, wanted=wanted)
    assert [list(g) for g in some] == [list(plain[1]), list(plain[4])]
    for group, before in zip(some, (plain[1], plain[4]), strict=True):
        assert all(np.array_equal(s.logprobs, before[row].logprobs) for row, s in group.items())
    assert scored(wanted=np.zeros(40, bool)) == []


def test_the_pass_needs_no_entropies(monkeypatch, tmp_path):
    """They would cost passes over the logits."""
    import main_jax.filter.passes as passes

    make_models(tmp_path, "qwen2")
    asked = []

    def watched(*arguments, **options):
        asked.append(options["with_entropies"])
        return score(*arguments, **options)

    monkeypatch.setattr(passes, "score", watched)
    filter_candidates(settings(tmp_path))
    assert asked == [False] * 3
