"""A row that nothing finite comes of: its steps are skipped, counted over interruptions, and too many end the run."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lm_jax.checkpoints.orbax import Checkpoints
from lm_jax.data.text import TextEncoder
from lm_jax.data.tokenizers import end_token_ids, load_tokenizer
from tests.e2e import common
from tests.e2e.common import TIMING, arguments, fork

BAD, EPOCHS, STEPS, EVERY = 5, 3, 18, 5
SETTINGS = ("max_length=64", f"epochs={EPOCHS}", "seed=7", "optim.learning_rate=1e-3")
SETTINGS += ("optim.warmup_ratio=0", "compute.attention=reference", f"checkpoints.every={EVERY}", "checkpoints.keep=9")
NAME = f"pairs.jsonl row {BAD}"


class Place:
    """12 pairs with token weights, those of one of them too large for the square of its gradient."""

    def __init__(self, path: Path):
        self.path = path
        self.model = common.make_model(path / "model", hidden_size=64, intermediate_size=64)
        rows = common.read_rows(common.make_pairs(path / "pairs.jsonl"))
        tokenizer = load_tokenizer(self.model, 320)
        encoder = TextEncoder(tokenizer, 64, end_token_ids(self.model, tokenizer))
        for number, row in enumerate(rows):
            for side in ("chosen", "rejected"):
                length = len(encoder.encode(row["prompt"], row[side], "row").response_ids)
                row[f"{side}_token_scores"] = [3e38 if number == BAD and side == "chosen" else 1.0] * length
        self.pairs = common.write_rows(path / "pairs.jsonl", rows)

    def flags(self, name: str, *settings: str) -> list[str]:
        given = (f"model={self.model}", f"input={self.pairs}", f"output={self.path / name}", "weights=columns")
        given += (f"reference_cache={self.path}/reference",)
        return arguments("musc_train", *given, "batch.pairs=2", *SETTINGS, *settings, preset="tiny")

    def command(self, name: str, *settings: str):
        return fork("musc_train", *self.flags(name, *settings))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def whole(place) -> tuple[Path, str]:
    return place.path / "whole", place.command("whole").ok().stderr


def metrics(output):
    return [{k: v for k, v in r.items() if k not in TIMING} for r in common.read_rows(output / "metrics.jsonl")]


def skipped_steps(output) -> list[int]:
    return [r["step"] for r in metrics(output) if r.get("loss") is None and "eval_loss" not in r]


def saved_steps(output) -> list[int]:
    return sorted(int(p.name) for p in (output / "checkpoints").iterdir() if p.name.isdigit())


def contents(output, step=STEPS) -> dict:
    with Checkpoints(f"{output}/checkpoints", keep=None) as checkpoints:
        return checkpoints.restore({"params": None, "optimizer": None, "progress": None}, step)


def assert_same(output, expected):
    ours, theirs = contents(output), contents(expected)
    leaves = zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True)
    assert [] == [path for (path, a), b in leaves if not np.array_equal(np.asarray(a), np.asarray(b))]
    assert metrics(output) == metrics(expected)


def copy_of(place, run, name) -> Path:
    output = shutil.copytree(run, place.path / name)
    settings = json.loads((output / "config.json").read_text())
    settings["config"]["output"] = str(output)
    (output / "config.json").write_text(json.dumps(settings))
    return output


def test_a_step_an_epoch_is_skipped(whole):
    output, stderr = whole
    skipped, records = skipped_steps(output), metrics(output)
    assert [(s - 1) // (STEPS // EPOCHS) for s in skipped] == [0, 1, 2]
    assert [r["skipped_steps"] for r in records] == [sum(s <= r["step"] for s in skipped) for r in records]
    assert [r["step"] for r in records] == [*range(1, STEPS + 1)]
    for record in records:
        assert record.get("num_nonfinite", 0) == [*record.values()].count(None), record
        assert (record["loss"] is None or record["grad_norm"] is None) == (record["step"] in skipped), record
    lines = [line for line in stderr.splitlines() if "skipped" in line]
    for number, (line, step) in enumerate(zip(lines, skipped, strict=True), 1):
        assert line.startswith(f"step {step}: ") and NAME in line, line
        assert f"number {number} of at most 5" in line and line.count("pairs.jsonl row") >= 2, line
    kept = contents(output)
    assert kept["progress"]["skipped_steps"] == EPOCHS and kept["optimizer"]["step"] == STEPS
    counts = [v for p, v in jax.tree.leaves_with_path(kept["optimizer"]["opt_state"]) if "count" in str(p[-1])]
    assert counts and {int(c) for c in counts} == {STEPS - EPOCHS}
    rates = {r["step"]: r["learning_rate"] for r in records}
    assert all(rates[s] == rates[s + 1] for s in skipped if s < STEPS), rates
    assert all(rates[s] > rates[s + 1] for s in range(1, STEPS) if s not in skipped), rates


def test_no_checkpoint_of_a_skipped_step(whole):
    """It waits for the next one that is not skipped; the last is always there."""
    output, _ = whole
    skipped = skipped_steps(output)
    due = [*range(EVERY, STEPS, EVERY)]
    assert {*due} & {*skipped}, "nothing to see"
    assert saved_steps(output) == [*(next(s for s in range(d, STEPS) if s not in skipped) for d in due), STEPS]


def test_the_count_goes_on_where_a_run_does(place, whole):
    output = copy_of(place, whole[0], "resumed")
    first = skipped_steps(output)[0]
    last = next(s for s in saved_steps(output) if s > first)
    for step in saved_steps(output):
        if step > last:
            shutil.rmtree(output / "checkpoints" / str(step))
    assert contents(output, last)["progress"]["skipped_steps"] == 1
    stderr = place.command("resumed").ok().stderr
    assert f"after step {last}" in stderr and "number 2 of at most 5" in stderr and "number 1 of" not in stderr
    assert_same(output, whole[0])


def test_one_too_many_and_then_allowed(place, whole):
    expected = whole[0]
    _, second, _ = skipped_steps(expected)
    output = place.path / "limited"
    line = place.command("limited", "optim.skip_limit=1").error()
    path = output / "skipped" / f"step_{second}.npz"
    parts = (f"step {second}: ", NAME, "1 steps were skipped", "skip_limit=1", str(path), "intact")
    assert [] == [part for part in parts if part not in line], line
    with np.load(path, allow_pickle=False) as batch:
        stacks = {name.split("/")[0] for name in batch if "/" in name}
        assert NAME in batch["rows"]
        assert max(batch[f"{stack}/weights"].max() for stack in stacks) == np.float32(3e38)
        ids = np.concatenate([batch[f"{stack}/example_ids"].ravel() for stack in stacks])
        assert sorted(ids[ids >= 0]) == [int(name.split()[-1]) for name in batch["rows"]]
    assert max(saved_steps(output)) < second
    again = place.command("limited", "optim.skip_limit=1").error()
    assert again == line  # what restarts a failed command comes no further
    place.command("limited").ok()
    assert_same(output, expected)


@pytest.mark.parametrize("settings", [("lora.rank=3", "lora.dropout=0.1"), ("lora.rank=3", "lora.base=nf4")])
def test_adapters(place, settings):
    name = settings[-1]
    place.command(name, *settings, "max_steps=6").ok()
    output = place.path / name
    assert len(skipped_steps(output)) == 1 and metrics(output)[-1]["skipped_steps"] == 1
    for leaf in jax.tree.leaves(contents(output, 6)["params"]):
        assert np.isfinite(leaf).all()


def test_supervised(place):
    """A token whose embedding is no bfloat16 any more, in one row; 0 stops at once."""
    model = Path(shutil.copytree(place.model, place.path / "huge"))
    weights = load_file(model / "model.safetensors")
    token = load_tokenizer(str(model), 320)("@")["input_ids"][0]
    weights["model.embed_tokens.weight"][token] = np.finfo(np.float32).max
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    rows = [{"prompt": f"say that {i} cats sat", "response": f"{i} cats {'@' * (i == 3)} sat"} for i in range(8)]
    given = (f"model={model}", f"input={common.write_rows(place.path / 'rows.jsonl', rows)}", "dtype=bfloat16")
    given += (*SETTINGS, "epochs=2", "batch.examples=2")

    def train(name, *settings):
        flags = (*given, f"output={place.path / name}", *settings)
        return fork("main_train", *arguments("main_train", *flags, preset="tiny"))

    stderr = train("supervised").ok().stderr
    first, second = skipped_steps(place.path / "supervised")
    assert first <= 4 < second and metrics(place.path / "supervised")[-1]["skipped_steps"] == 2
    assert f"step {first}: loss is nan (in rows.jsonl row 3); skipped, number 1 of at most 5" in stderr
    line = train("at_once", "optim.skip_limit=0").error()
    assert line.startswith(f"step {first}: loss is nan (in rows.jsonl row 3); 0 steps were skipped"), line
    assert (place.path / "at_once" / "skipped" / f"step_{first}.npz").exists()


def test_a_run_of_skipped_steps_alone_trains_nothing(place):
    model = Path(shutil.copytree(place.model, place.path / "loud"))
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][:] = 1e38  # finite itself
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "a cat"}]}
        for i in range(8)
    ]
    given = (f"model={model}", f"input={common.write_rows(place.path / 'loud.jsonl', rows)}", "max_steps=2")
    flags = (
        *given,
        f"output={place.path / 'nothing'}",
        "max_length=64",
        "batch.examples=4",
        "epochs=8",
    )
    line = fork("main_train", *arguments("main_train", *flags, preset="tiny")).error()
    assert "all 2 steps were skipped" in line and "nothing is saved" in line, line
    assert saved_steps(place.path / "nothing") == []
