"""The main job, as a user runs it: checkpoint and pairs in, a trained checkpoint that torch reads out."""

import math
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from tests.e2e import common
from tests.e2e.common import SMALL_SCORE, SMALL_TRAIN, TIMING, arguments, fork, run

ROUNDING = 1e-6  # of sums of a few dozen fp32 log-probs
TRL = {"loss", "grad_norm", "learning_rate", "num_tokens"} | {
    f"{kind}/{side}" for kind in ("rewards", "logps") for side in ("chosen", "rejected")
}
OBJECTIVE = {"loss", "rewards/margins", "rewards/accuracies", *(n for n in TRL if "/" in n)}
OURS = {"tokens_per_second", "padding_fraction", "data_wait_fraction", "num_compiles"}


class Place:
    """A directory with a model, pairs and what is made of them."""

    def __init__(self, path: Path):
        self.path = path
        self.model = common.make_model(path / "model")
        self.pairs = common.make_pairs(path / "pairs.jsonl")
        self.held_out = common.make_pairs(path / "held_out.jsonl", 5)

    def train_flags(self, name: str, *settings: str) -> list[str]:
        """Later settings win."""
        given = (f"model={self.model}", f"input={self.pairs}", f"output={self.path / name}", "optim.learning_rate=1e-3")
        return arguments("musc_train", *given, *SMALL_TRAIN, *settings, preset="tiny")

    def train(self, name: str, *settings: str) -> list[dict]:
        """Metrics of a new run."""
        fork("musc_train", *self.train_flags(name, *settings)).ok()
        return common.read_rows(self.path / name / "metrics.jsonl")

    def score(self, model: Path | str, rows: list[dict], *settings: str) -> list[dict]:
        path, output = self.path / "rows.jsonl", self.path / "scored.jsonl"
        given = (f"model={model}", f"input={common.write_rows(path, rows)}", f"output={output}")
        fork("score", *arguments("score", *given, *SMALL_SCORE, *settings)).ok()
        return common.read_rows(output)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def trained(place):
    """(run directory, metrics, what the command said)."""
    evaluation = (f"eval_input={place.held_out}", "eval_every=2", "epochs=2", "profile=2:3")
    done = run("musc_train", *place.train_flags("run", *evaluation)).ok()
    return place.path / "run", common.read_rows(place.path / "run" / "metrics.jsonl"), done


@pytest.fixture(scope="module")
def exported(place, trained) -> Path:
    output = place.path / "run-hf"
    run("export_hf", *arguments("export_hf", f"model={trained[0]}", f"output={output}", "dtype=float32")).ok()
    return output


def steps(metrics: list[dict]) -> list[dict]:
    return [r for r in metrics if "loss" in r]


def untimed(metrics: list[dict]) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in TIMING} for r in metrics]


def assert_starts_at_its_reference(metrics: list[dict], tolerance: float = ROUNDING) -> None:
    first = steps(metrics)[0]
    assert first["step"] == 1
    assert first["loss"] == pytest.approx(math.log(2), abs=tolerance)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert first[name] == pytest.approx(0, abs=tolerance)


def test_metrics(trained):
    _, metrics, _ = trained
    for record in steps(metrics):
        assert (TRL | OBJECTIVE | OURS) - record.keys() == set()
        assert np.isfinite(list(record.values())).all()
        margin = record["rewards/chosen"] - record["rewards/rejected"]
        assert record["rewards/margins"] == pytest.approx(margin, abs=ROUNDING)
        assert 0 <= record["padding_fraction"] < 1 and record["num_compiles"] == 1
    assert [r["step"] for r in steps(metrics)] == [*range(1, len(steps(metrics)) + 1)]
    assert_starts_at_its_reference(metrics)
    assert steps(metrics)[-1]["loss"] < 0.6 and steps(metrics)[-1]["rewards/accuracies"] == 1
    assert sum(r["pairs"] for r in steps(metrics)) == 2 * 12  # every pair once an epoch


def test_evaluation(trained):
    _, metrics, _ = trained
    evaluated = [r for r in metrics if "eval_loss" in r]
    last = len(steps(metrics))
    assert [r["step"] for r in evaluated] == sorted({*range(2, last + 1, 2), last})
    for record in evaluated:
        assert {f"eval_{name}" for name in OBJECTIVE} - record.keys() == set()
        assert record["eval_pairs"] == 5
    assert evaluated[-1]["eval_loss"] < math.log(2)  # its pairs are like those trained on


def test_what_a_person_sees(trained):
    output, metrics, done = trained
    said = done.stderr
    for part in ("12 rows read, 12 pairs kept", "uniform", f"step {len(steps(metrics))}/", "tokens/s", "done: "):
        assert part in said, said
    for name in ("metrics.jsonl", "checkpoints", "tensorboard", "plots", "profile"):
        assert str(output / name) in said and (output / name).exists()
    assert f"--config.model={output}" in said  # the export's command
    assert {"config.json", "model", "metrics.jsonl", "checkpoints", "tensorboard"} <= {p.name for p in output.iterdir()}


def test_the_export_is_the_trained_model(place, exported):
    before = load_file(Path(place.model) / "model.safetensors")
    after = load_file(exported / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(after[n].shape == before[n].shape and not torch.equal(after[n], before[n]) for n in after)
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(p) for p in (exported, place.model))
    chat = [{"role": "user", "content": "say"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)


def test_a_trace_of_the_steps(trained):
    output, _, done = trained
    (trace,) = (output / "profile").glob("plugins/profile/*/*.xplane.pb")
    content = trace.read_bytes()
    assert b"train_step" in content  # what was traced is the step
    assert f"traced steps 2 to 3: tensorboard --logdir {output}/profile" in done.stderr


@pytest.mark.slow
def test_plots_of_a_run_that_is_finished_already(place):
    settings = ("max_steps=2", "weights=entropy", "epochs=1")
    place.train("drawn", *settings)
    plots = place.path / "drawn" / "plots"
    names = {"loss", "margins", "logps", "accuracy", "grad_norm", "lengths", "token_weights"}
    before = {p.name: p.read_bytes() for p in plots.iterdir()}
    assert before.keys() == {f"{name}.png" for name in names}
    shutil.rmtree(plots)
    place.train("drawn", *settings)
    assert {p.name: p.read_bytes() for p in plots.iterdir()} == before


def test_the_model_card(place, trained, exported):
    output, metrics, _ = trained
    card = ModelCard.load(exported / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("transformers", None)  # a directory is no base on the hub
    assert {"musc", "dpo"} <= set(card.data.tags) and "lora" not in card.data.tags
    evaluated = [r for r in metrics if "eval_loss" in r][-1]
    last = steps(metrics)[-1]
    assert f"| loss | {last['loss']:.4f} | {evaluated['eval_loss']:.4f} |" in card.text
    line = next(line for line in card.text.splitlines() if line.startswith("python -m launch."))
    flags = place.train_flags("run", f"eval_input={place.held_out}", "eval_every=2", "epochs=2", "profile=2:3")
    assert shlex.split(line) == ["python", "-m", "launch.musc_train", *flags]
    assert "\noptim.learning_rate = 0.001\n" in card.text and "transformers 5" in card.text
    # The places that the user named, and no other of this machine
    rest = card.text.replace("\\_", "_")
    for given in (place.model, place.pairs, place.held_out, str(output)):
        rest = rest.replace(given, "")
    assert str(place.path) not in rest and str(Path.home()) not in rest and "/tmp" not in rest


def test_no_upload_without_a_token(place, trained, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    output = place.path / "unsent"
    line = fork(
        "export_hf", *arguments("export_hf", f"model={trained[0]}", f"output={output}", "push_to_hub=a/b")
    ).error()
    assert "HF_TOKEN" in line and not output.exists()


ROWS = [{"prompt": f"say {i}", "response": f"{i} cats sat on the mat, and {'the hat ' * i}"} for i in range(6)]
ROWS += [{"prompt": [{"role": "user", "content": "what is this"}], "response": "that, and this"}]


def test_log_probs_of_run_export_and_torch_agree(place, trained, exported):
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    rows = {where: place.score(where, ROWS) for where in (trained[0], exported)}
    untrained = place.score(place.model, ROWS)
    for row, same, other in zip(*rows.values(), untrained, strict=True):
        prompt, response = row["prompt_token_ids"], row["token_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits, -1)
        entropies = -(expected.exp() * expected).sum(-1)
        expected = expected.gather(1, torch.tensor(response)[:, None])[:, 0]
        for scored in (row, same):
            np.testing.assert_allclose(scored["token_logprobs"], expected, rtol=0, atol=1e-4)
            np.testing.assert_allclose(scored["token_entropies"], entropies, rtol=0, atol=1e-4)
            assert scored["logprob"] == pytest.approx(sum(expected.tolist()), abs=1e-3)
        assert np.abs(other["token_logprobs"] - expected.numpy()).max() > 1e-2  # a stale model would be seen


@pytest.fixture(scope="module")
def token_counts(place) -> list[dict]:
    """Of each pair, the tokens of chosen and rejected."""
    pairs = common.read_rows(place.pairs)
    sides = ("chosen", "rejected")
    scored = place.score(place.model, [{"prompt": p["prompt"], "response": p[side]} for p in pairs for side in sides])
    counts = iter(row["num_tokens"] for row in scored)
    return [{side: next(counts) for side in sides} for _ in pairs]


def weighted(place: Place, token_counts: list[dict], value: float) -> str:
    """The pairs with a weight of `value` for each token."""
    rows = [
        pair | {f"{side}_token_scores": [value] * count for side, count in counts.items()}
        for pair, counts in zip(common.read_rows(place.pairs), token_counts, strict=True)
    ]
    return common.write_rows(place.path / f"weighted_{value}.jsonl", rows)


@pytest.fixture(scope="module")
def uniform(place) -> list[dict]:
    return place.train("uniform", "weights=uniform")


@pytest.mark.parametrize("rule", ["perplexity", "entropy"])
def test_weight_rules(place, uniform, rule):
    metrics = place.train(rule, f"weights={rule}")
    assert_starts_at_its_reference(metrics)
    assert steps(metrics)[-1]["loss"] < 0.65
    # The same sums of log-probs, another gradient
    assert steps(metrics)[0]["logps/chosen"] == steps(uniform)[0]["logps/chosen"]
    assert steps(metrics)[0]["grad_norm"] != pytest.approx(steps(uniform)[0]["grad_norm"], rel=1e-3)


def test_columns_of_ones_are_plain_dpo(place, uniform, token_counts):
    metrics = place.train("ones", f"input={weighted(place, token_counts, 1.0)}")  # `auto` finds the columns
    assert untimed(metrics) == untimed(uniform)


def test_columns_of_twos_double_the_reward(place, token_counts):
    twos = place.train("twos", f"input={weighted(place, token_counts, 2.0)}", "weights=columns")
    doubled = place.train("doubled", "weights=uniform", "loss.beta=0.2")
    for ours, theirs in zip(untimed(twos), untimed(doubled), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_a_run_goes_on_from_a_run(place, trained):
    """A run directory as `model` is its newest checkpoint, and its own reference unless another is given."""
    second = place.train("second", f"model={trained[0]}")
    assert_starts_at_its_reference(second)
    third = place.train("third", f"model={trained[0]}", f"reference={place.model}")
    assert steps(third)[0]["loss"] < 0.6
    assert steps(third)[0]["logps/chosen"] == pytest.approx(steps(second)[0]["logps/chosen"], abs=1e-4)


def test_bfloat16(place, uniform):
    metrics = place.train("bfloat16", "dtype=bfloat16")
    assert_starts_at_its_reference(metrics, 1e-2)
    assert steps(metrics)[0]["logps/chosen"] == pytest.approx(steps(uniform)[0]["logps/chosen"], rel=0.02)
    assert steps(metrics)[0]["logps/chosen"] != steps(uniform)[0]["logps/chosen"]


def test_how_a_step_is_cut_changes_nothing(place, uniform):
    """Steps of 5, 5 and 2 of the 12 pairs, in several microbatches or in one."""
    metrics = place.train("one_microbatch", "batch.rows_per_device=5")
    assert [r["pairs"] for r in steps(metrics)] == [5, 5, 2]
    assert [r["padding_fraction"] for r in metrics] != [r["padding_fraction"] for r in uniform]
    for ours, theirs in zip(untimed(metrics), untimed(uniform), strict=True):
        ours.pop("padding_fraction"), theirs.pop("padding_fraction")
        if ours["step"] == 1:  # margins are 0 but for rounding, and their signs are noise
            ours.pop("rewards/accuracies"), theirs.pop("rewards/accuracies")
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_simpo_needs_no_reference(place):
    metrics = steps(place.train("simpo", "loss.kind=simpo", "loss.beta=2.0", "epochs=4"))
    epoch = len(metrics) // 4
    assert np.mean([r["loss"] for r in metrics[-epoch:]]) < np.mean([r["loss"] for r in metrics[:epoch]])
    assert not (place.path / "simpo" / "reference").exists()
