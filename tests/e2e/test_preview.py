"""`launch.musc_train --preview=N`: the rows that training would see, against transformers; nothing written."""

import re
import subprocess

import numpy as np
import pytest
import torch
import transformers

from tests.e2e import common
from tests.e2e.common import SMALL_TRAIN, arguments, fork

CELL = re.compile(r"(\d+) +(\d+) ((?: +-?\d+\.\d+)*) *(\S(?:.*?\S)??)(?: {2,}|$)")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return common.make_model(tmp_path_factory.mktemp("model"))


def flags(model, path, *settings):
    given = (f"model={model}", f"input={path}", f"output={path.parent / 'run'}")
    return arguments("musc_train", *given, *SMALL_TRAIN, *settings, preset="tiny")


def shown(stdout: str) -> list[dict[str, list]]:
    """Of each side of each row: ids, and numbers of the response's tokens."""
    sides = []
    for line in stdout.splitlines():
        if re.match("(chosen|rejected): ", line):
            sides.append({"ids": [], "numbers": []})
        elif line.startswith("    "):
            for position, token, numbers, _ in CELL.findall(line.strip()):
                assert int(position) == len(sides[-1]["ids"])
                sides[-1]["ids"].append(int(token))
                if numbers:
                    sides[-1]["numbers"].append([float(n) for n in numbers.split()])
    return sides


def messages(i):
    return [{"role": "user", "content": f"say {i}"}]


def test_tokens_and_own_scores(model, tmp_path):
    """Messages through the chat template, by transformers; weights from the rows' columns."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    answers = [("the cat", "the hat"), ("日本 and that", "é"), ("never", "shown")]
    rows, ids = [], []
    for i, pair in enumerate(answers):
        row = {"prompt": messages(i)}
        for side, text in zip(("chosen", "rejected"), pair, strict=True):
            row[side] = [{"role": "assistant", "content": text}]
            start = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
            whole = tokenizer.apply_chat_template(row["prompt"] + row[side])["input_ids"]
            whole = whole[: len(whole) - whole[::-1].index(tokenizer.eos_token_id)]  # without the line break after it
            row[f"{side}_token_scores"] = [round(0.1 * t + i, 3) for t in range(len(whole) - len(start))]
            ids.append(whole)
        rows.append(row)
    path = tmp_path / "pairs.jsonl"
    common.write_rows(path, rows)
    done = fork("musc_train", *flags(model, path), "--preview=2").ok()
    found = shown(done.stdout)
    assert [side["ids"] for side in found] == ids[:4]
    scores = [row[f"{side}_token_scores"] for row in rows[:2] for side in ("chosen", "rejected")]
    for side, expected in zip(found, scores, strict=True):
        np.testing.assert_allclose(np.array(side["numbers"])[:, 0], expected, atol=6e-4)
    assert "pairs.jsonl row 0 (0)" in done.stdout and "never" not in done.stdout and "\033" not in done.stdout
    assert "weights: columns" in done.stderr and sorted(p.name for p in tmp_path.iterdir()) == ["pairs.jsonl"]


def test_weights_of_the_reference(model, tmp_path):
    """`perplexity`: -log p of the reference by torch, scaled to mean 1 and clipped to [0, 2]."""
    path = tmp_path / "pairs.jsonl"
    common.make_pairs(path)
    done = fork("musc_train", *flags(model, path, "weights=perplexity"), "--preview=3").ok()
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    sides = shown(done.stdout)
    assert len(sides) == 6
    for side in sides:
        ids, numbers = torch.tensor(side["ids"]), np.array(side["numbers"])
        with torch.no_grad():
            logps = reference(ids[None]).logits[0].log_softmax(-1)
        picked = logps[torch.arange(len(ids) - 1), ids[1:]][-len(numbers) :].numpy()
        np.testing.assert_allclose(numbers[:, 1], picked, atol=2e-3)
        np.testing.assert_allclose(numbers[:, 0], np.clip(picked / picked.mean(), 0, 2), atol=2e-3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pairs.jsonl"]


def test_what_is_cut_and_what_is_not_known_yet(model, tmp_path):
    path = tmp_path / "pairs.jsonl"
    common.make_pairs(path, perturbed_prompt=lambda i: "say")
    done = fork("musc_train", *flags(model, path, "weights=online:kl", "max_length=20"), "--preview=99").ok()
    assert "the policy computes them in every step" in done.stderr and len(shown(done.stdout)) == 24
    cut = re.findall(r"truncated: (\d+) of (\d+) response tokens lie beyond max_length", done.stdout)
    assert cut and f"{len(cut)} of 24 responses truncated" in done.stderr
    assert all(not side["numbers"] for side in shown(done.stdout))


def test_supervised_rows(model, tmp_path):
    """Of a conversation every turn of the assistant is shown as learnt, and what lies between as not."""
    turns = [("user", "say 1"), ("assistant", "the cat"), ("user", "and 2"), ("assistant", "the hat")]
    rows = [{"messages": [{"role": r, "content": c} for r, c in turns], "weight": 0.5}] * 3
    path = common.write_rows(tmp_path / "rows.jsonl", rows)
    given = (f"model={model}", f"input={path}", f"output={tmp_path}/none", "max_length=128")
    done = fork("main_train", *arguments("main_train", *given, preset="tiny"), "--preview=2").ok()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    start = tokenizer.apply_chat_template(rows[0]["messages"][:1], add_generation_prompt=True)["input_ids"]
    second = tokenizer.apply_chat_template(rows[0]["messages"][:3], add_generation_prompt=True)["input_ids"]
    first = tokenizer.apply_chat_template(rows[0]["messages"][:2])["input_ids"]
    others = len(second) - (len(first) - first[::-1].index(tokenizer.eos_token_id))
    assert f"seed: {len(start)} tokens of prompt" in done.stdout and f", {others} of others' turns" in done.stdout
    assert "rows.jsonl row 1 (1, seed)" in done.stdout and "row 2" not in done.stdout
    assert "3 rows read, 3 kept; 0 of them synthetic; 2 of them taken" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl"]
    short = arguments("main_train", *given, "max_length=30", preset="tiny")
    assert "response tokens lie beyond max_length" in fork("main_train", *short, "--preview=1").ok().stdout


def test_refused(model, tmp_path):
    path = tmp_path / "pairs.jsonl"
    common.make_pairs(path)
    assert "--preview=0" in fork("musc_train", *flags(model, path), "--preview=0").error()
    assert "'preview'" in fork("score", *arguments("score", "model=x"), "--preview=1").error()
    assert "weights=store" in fork("musc_train", *flags(model, path, "weights=store"), "--preview=1").error()


def test_a_reader_that_goes_away(model, tmp_path):
    """As `head` does: no error to look for."""
    path = tmp_path / "pairs.jsonl"
    common.make_pairs(path)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = common.start("musc_train", *flags(model, path), "--preview=5", **pipes)
    process.stdout.close()
    assert "error" not in process.stderr.read() and process.wait(60) == 141
