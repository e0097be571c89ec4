"""Weighing pairs and training on the weights, as a user does it; killed, continued, and what is refused."""

import json
import math
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lm_jax.data.score_store import ScoreStore
from tests.checkpoints import make_tokenizer
from tests.e2e import common
from tests.e2e.common import SMALL_TRAIN, TIMING, Fork, arguments, fork, run

SMALL = ("max_length=64", "batch.row_length=192", "batch.rows=2")


def perturbed(i):
    return f"say that {i} cats" if i != 3 else f"say that {i} cats sat"  # of pair 3 the prompt itself


class Place:
    def __init__(self, path: Path):
        self.path = path
        self.model = common.make_model(path / "model")
        self.pairs = common.make_pairs(path / "pairs.jsonl", perturbed_prompt=perturbed)

    def flags(self, name: str, *settings: str) -> list[str]:
        """Later settings win."""
        given = (f"model={self.model}", f"input={self.pairs}", f"output={self.path / name}.jsonl")
        return arguments("musc_token_weights", *given, *SMALL, *settings)

    def weigh(self, name: str, *settings: str, **options) -> dict:
        """What the command reports."""
        return json.loads(fork("musc_token_weights", *self.flags(name, *settings), **options).ok().stdout)

    def store(self, name: str) -> ScoreStore:
        return ScoreStore.open(f"{self.path / name}.weights")

    def train_flags(self, name: str, rows: Path | str, *settings: str) -> list[str]:
        given = (f"model={self.model}", f"input={rows}", f"output={self.path / name}", "optim.learning_rate=1e-3")
        return arguments("musc_train", *given, *SMALL_TRAIN, *settings, preset="tiny")

    def train(self, name: str, rows: Path | str, *settings: str) -> list[dict]:
        """Metrics of a new run, without timings."""
        fork("musc_train", *self.train_flags(name, rows, *settings)).ok()
        metrics = common.read_rows(self.path / name / "metrics.jsonl")
        return [{k: v for k, v in record.items() if k not in TIMING} for record in metrics]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def weighed(place):
    """(report, what the command said): all rules, the default first."""
    done = run("musc_token_weights", *place.flags("weighed", "rules=all")).ok()
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def uniform(place, weighed) -> list[dict]:
    """Metrics of plain DPO on the same rows."""
    return place.train("uniform", place.path / "weighed.jsonl", "weights=uniform")


def values(store: ScoreStore) -> dict[str, np.ndarray]:
    assert store.missing().size == 0
    return {name: np.concatenate(arrays) for name, arrays in store.read(np.arange(len(store.lengths))).items()}


def test_what_a_person_sees(place, weighed):
    report, said = weighed
    store = place.store("weighed")
    assert report["rows"] == 12 and report["tokens"] == store.lengths.sum() and report["same_prompts"] == 1
    assert report["store"] == store.path and report["output"] == f"{place.path / 'weighed'}.jsonl"
    size = sum(p.stat().st_size for p in Path(store.path).rglob("*") if p.is_file())
    assert report["store_bytes_per_token"] == pytest.approx(size / store.lengths.sum() / 9, abs=1e-3)
    assert "1 of 12 perturbed prompts equal their prompt" in said and "12 rows read, 12 pairs kept" in said
    for rule, flat in values(store).items():
        told = report["weights"][rule]
        assert told == {
            "mean": pytest.approx(flat.mean(), abs=1e-3),
            "at_0": pytest.approx((flat == 0).mean(), abs=1e-3),
            "at_2": pytest.approx((flat == 2).mean(), abs=1e-3),
        }
    np.testing.assert_allclose(store.read([6])["calibrated_entropy"][0], 1.2, atol=1e-5)


@pytest.mark.slow
def test_online_weights_begin_as_those_of_the_store(place, weighed):
    """At step 1 the policy is the model that weighed; then it moves, and its weights with it."""
    rows = place.path / "weighed.jsonl"
    held_out = (f"eval_input={rows}", "eval_every=1", "max_steps=2")
    stored, online = (
        place.train(f"{name}-start", rows, f"weights={name}:kl", "optim.warmup_ratio=0", *held_out)
        for name in ("store", "online")
    )
    assert online[0]["num_flops"] > stored[0]["num_flops"]  # the weights are computed anew
    same = [{key: value for key, value in run[0].items() if key != "num_flops"} for run in (online, stored)]
    assert same[0] == pytest.approx(same[1], rel=1e-4) and online[0]["grad_norm"] > 0
    assert online[1] != pytest.approx(stored[1], rel=1e-4)
    assert [r.get("eval_pairs") for r in online] == [None, 12, None, 12]


@pytest.mark.parametrize("rule", ["calibrated_entropy", "pmi"])
@pytest.mark.slow
def test_training_on_the_store_is_training_on_the_same_numbers(place, weighed, uniform, rule):
    weights = place.store("weighed").read(np.arange(24))[rule]
    rows = [
        row | {"chosen_token_scores": weights[2 * i].tolist(), "rejected_token_scores": weights[2 * i + 1].tolist()}
        for i, row in enumerate(common.read_rows(place.pairs))
    ]
    columns = place.train(f"columns-{rule}", common.write_rows(place.path / f"columns-{rule}.jsonl", rows))
    setting = [] if rule == "calibrated_entropy" else [f"weights=store:{rule}"]  # `auto` takes the first rule
    stored = place.train(f"stored-{rule}", place.path / "weighed.jsonl", *setting)
    assert stored == columns and len(stored) > 2
    assert stored[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert stored[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert stored[0]["logps/chosen"] == uniform[0]["logps/chosen"]
    assert stored[0]["grad_norm"] != pytest.approx(uniform[0]["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_uniform_weights_of_the_store_are_plain_dpo(place, weighed, uniform):
    assert uniform == place.train("stored-uniform", place.path / "weighed.jsonl", "weights=store:uniform")


@pytest.mark.slow
def test_some_rows_in_another_order_and_another_place(place, weighed, tmp_path):
    """A subset, shuffled, moved together with the store; and held-out rows that point at it too."""
    rows = common.read_rows(place.path / "weighed.jsonl")
    shutil.copytree(f"{place.path / 'weighed'}.weights", tmp_path / "weighed.weights")
    some = common.write_rows(tmp_path / "some.jsonl", [rows[i] for i in (7, 2, 11, 5)])
    held_out = common.write_rows(tmp_path / "held_out.jsonl", [rows[i] for i in (1, 0)])
    moved = place.train("moved", some, f"eval_input={held_out}")
    for row in rows:
        row["token_weights"]["store"] = f"{place.path}/weighed.weights"
    some = common.write_rows(tmp_path / "absolute.jsonl", [rows[i] for i in (7, 2, 11, 5)])
    assert moved == place.train("absolute", some, f"eval_input={held_out}") and "eval_loss" in moved[-1]


@pytest.mark.parametrize("mesh", [(1, 2, 2), (4, 1, 1)])
def test_more_devices_give_the_same(place, weighed, mesh):
    name = "x".join(map(str, mesh))
    sizes = [f"mesh.{axis}={n}" for axis, n in zip(("data", "fsdp", "tensor"), mesh, strict=True)]
    place.weigh(name, "rules=all", "batch.rows=4", *sizes, devices=4)
    expected = values(place.store("weighed"))
    for rule, found in values(place.store(name)).items():
        np.testing.assert_allclose(found, expected[rule], rtol=0, atol=2e-5, err_msg=rule)


def test_killed_between_batches_and_continued(place):
    """The same numbers to the bit; what was there when it was killed is read and not computed again."""
    pairs = common.make_pairs(place.path / "many.jsonl", 400, perturbed_prompt=lambda i: f"say {i}")
    settings = (
        f"input={pairs}",
        "batch.rows=1",
        "batch.row_length=128",
        "rules=calibrated_entropy,kl,shuffled",
    )
    place.weigh("undisturbed", *settings)
    expected = values(place.store("undisturbed"))
    left = [800]
    for _ in range(2):
        killed = Fork("musc_token_weights", *place.flags("killed", *settings))
        while not (place.path / "killed.weights" / "store.json").exists():
            assert killed.process.is_alive(), killed.wait().stderr
            time.sleep(0.0005)
        while place.store("killed").missing().size == left[-1]:  # readable while it is written
            assert killed.process.is_alive(), killed.wait().stderr
            time.sleep(0.01)
        killed.process.kill()
        assert killed.wait().status == -signal.SIGKILL
        store = place.store("killed")
        missing = store.missing()
        assert 0 < missing.size < left[-1]
        left.append(missing.size)
        done = np.setdiff1d(np.arange(800), missing)
        whole = place.store("undisturbed").read(done)
        for name, arrays in store.read(done).items():
            assert all(np.array_equal(a, b) for a, b in zip(arrays, whole[name], strict=True))
        assert not (place.path / "killed.jsonl").exists()
    place.weigh("killed", *settings)
    for name, found in values(place.store("killed")).items():
        np.testing.assert_array_equal(found, expected[name])
    ours, theirs = (common.read_rows(f"{place.path / name}.jsonl") for name in ("killed", "undisturbed"))
    for row in theirs:
        row["token_weights"]["store"] = "killed.weights"
    assert ours == theirs
    # With nothing left to do nothing is computed, and the output is as it was
    before = Path(f"{place.path / 'killed'}.jsonl").read_bytes()
    said = fork("musc_token_weights", *place.flags("killed", *settings)).ok().stderr
    assert not [line for line in said.splitlines() if line.startswith("response ")]
    assert Path(f"{place.path / 'killed'}.jsonl").read_bytes() == before


def test_a_row_without_a_perturbed_prompt(place, tmp_path):
    rows = common.read_rows(place.pairs)
    del rows[4]["perturbed_prompt"]
    pairs = common.write_rows(tmp_path / "pairs.jsonl", rows)
    line = fork("musc_token_weights", *place.flags("lacking", f"input={pairs}")).error()
    assert "pairs.jsonl row 4: column 'perturbed_prompt' is missing, which the rule calibrated_entropy" in line
    assert "uniform, perplexity, entropy, pmi" in line and not list(place.path.glob("lacking*"))
    assert place.weigh("unneeded", f"input={pairs}", "rules=pmi,entropy")["rows"] == 12


def test_a_model_that_gives_nan(place, tmp_path):
    model = shutil.copytree(place.model, tmp_path / "model")
    pairs = common.read_rows(place.pairs)
    for row in pairs:  # as long as may be, so that each is alone in its row: NaN spreads to neighbours
        row |= {side: row[side] * 9 for side in ("chosen", "rejected")}
    pairs[5]["chosen"] = "Z" + pairs[5]["chosen"]
    tensors = load_file(model / "model.safetensors")
    token = make_tokenizer(tmp_path / "tokenizer").convert_tokens_to_ids("Z")
    tensors["model.embed_tokens.weight"][token] = np.finfo(np.float32).max  # what bfloat16 rounds to infinity
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    rows = common.write_rows(tmp_path / "pairs.jsonl", pairs)
    settings = (f"model={model}", f"input={rows}", "batch.row_length=128", "dtype=bfloat16")
    line = fork("musc_token_weights", *place.flags("nan", *settings)).error()
    assert "pairs.jsonl row 5 (chosen): the log-prob of token " in line and "under the full prompt is nan" in line
    assert not (place.path / "nan.jsonl").exists()


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["dtype=bfloat16"], ['dtype was "float32" and is now "bfloat16"', "give another path"]),
        (["rules=kl"], ["rules was [", 'and is now ["kl"]']),
        (["rules=all", "keep_scores=true"], ["entropy_full"]),
        (["rules=all", "seed=1"], ["seed was 0 and is now 1"]),
        (["rules=all", "max_length=20"], ["tokens was"]),
    ],
)
def test_a_store_of_other_settings(place, weighed, settings, parts):
    settings = settings if any("rules" in s for s in settings) else ["rules=all", *settings]
    line = fork("musc_token_weights", *place.flags("weighed", *settings)).error()
    assert [] == [p for p in (*parts, "weighed.weights") if p not in line], line


def test_a_row_too_short_for_a_response_under_its_prompts(place):
    line = fork("musc_token_weights", *place.flags("short", "batch.row_length=40")).error()
    assert "pairs.jsonl row " in line and "under 2 prompts" in line and "config.batch.row_length" in line


def test_the_input_as_output(place):
    before = Path(place.pairs).read_bytes()
    line = fork("musc_token_weights", *place.flags("none", f"output={place.pairs}")).error()
    assert "config.input itself" in line and Path(place.pairs).read_bytes() == before


def test_unknown_rules(place):
    line = fork("musc_token_weights", *place.flags("none", "rules=surprise")).error()
    assert "config.rules: unknown rule 'surprise'; choose from all, calibrated_entropy" in line


def other_tokenizer(place, tmp_path) -> str:
    """The model with a tokenizer that cuts the same texts otherwise."""
    model = shutil.copytree(place.model, tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    return str(model)


def test_weights_for_something_else_are_refused(place, weighed, tmp_path):
    """Another tokenizer, another text, another max_length: one line each, before anything is written."""
    weighed_rows = place.path / "weighed.jsonl"
    rows = common.read_rows(weighed_rows)
    changed = [{**row, "prompt": row["prompt"] + "!"} if row["id"] == "pair-6" else row for row in rows]
    for row in changed:
        row["token_weights"]["store"] = f"{place.path}/weighed.weights"
    text = common.write_rows(tmp_path / "changed.jsonl", changed)
    cases = {
        "tokenizer": (place.train_flags("t", weighed_rows, f"model={other_tokenizer(place, tmp_path)}"), "row 0"),
        "text": (place.train_flags("t", text), "changed.jsonl row 6"),
        "length": (place.train_flags("t", weighed_rows, "max_length=24"), "weighed.jsonl row "),
    }
    for flags, where in cases.values():
        line = fork("musc_train", *flags).error()
        assert where in line and "were made for other texts, another tokenizer or another config.max_length" in line
        assert "run launch.musc_token_weights again" in line and not (place.path / "t").exists()


def test_rows_without_weights(place, weighed, tmp_path):
    line = fork("musc_train", *place.train_flags("t", place.pairs, "weights=store")).error()
    assert "pairs.jsonl row 0: no column 'token_weights'" in line
    rows = common.read_rows(place.path / "weighed.jsonl")
    del rows[2]["token_weights"]
    some = common.write_rows(tmp_path / "some.jsonl", rows)
    shutil.copytree(f"{place.path / 'weighed'}.weights", tmp_path / "weighed.weights")
    assert "some.jsonl row 2: no column 'token_weights'" in fork("musc_train", *place.train_flags("t", some)).error()
