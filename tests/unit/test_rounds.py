"""Rounds around parts that only note what they were called with: who gets which model, rows, seed and settings."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs.musc_rounds import get_config
from lm_jax.config import from_config_dict
from lm_jax.data.rows import write_jsonl
from lm_jax.errors import UserError
from lm_jax.generation import rounds as rounds_of_any
from musc_jax.pairs.tasks import read_tasks
from musc_jax.rounds import command as rounds
from musc_jax.rounds.report import rounds_table, summary
from tests.unit.test_pairs import _lines


class Parts:
    """Stands in for make_pairs, weigh_rows and train. `fault`: (part, round) that ends with an error."""

    def __init__(self):
        self.called, self.fault = [], None

    def record(self, part, config):
        number = int(Path(config.output).parent.name.removeprefix("round_"))
        self.called.append((part, number, config))
        if self.fault == (part, number):
            raise UserError("config.optim.learning_rate is bad and config.model too")

    def make_pairs(self, config, generator):
        self.record("pairs", config)
        count = len(read_tasks(config.input)[0]) if config.input else config.num_instructions
        stages = [{"stage": "decompose", "rows": count, "dropped": 1, "reasons": {"refusal": 1}}]
        counts = {"input": count, "pairs": count - 1, "dropped": 1, "stages": stages, "left_out": {}}
        write_jsonl(f"{config.output}.counts.json", [counts])
        write_jsonl(config.output, [{}])

    def weigh_rows(self, config):
        self.record("weights", config)

    def train(self, config):
        self.record("train", config)
        names = ("loss", "rewards/margins", "rewards/accuracies")
        steps = [{"step": n + 1, "pairs": 2.0, **dict.fromkeys(names, float(n))} for n in range(3)]
        write_jsonl(f"{config.output}/metrics.jsonl", [*steps, {"step": 3, "eval_loss": 0.5, "eval_tokens": 9}])

    def names(self):
        return [(part, number) for part, number, _ in self.called]

    def configs(self, part):
        return [config for name, _, config in self.called if name == part]


@pytest.fixture
def parts(monkeypatch) -> Parts:
    parts = Parts()
    monkeypatch.setattr(
        rounds_of_any, "open_model", lambda name: SimpleNamespace(content=lambda: {"fingerprint": name})
    )
    for name in ("make_pairs", "weigh_rows", "train"):
        monkeypatch.setattr(rounds, name, getattr(parts, name))
    return parts


@pytest.fixture
def run(tmp_path, parts):
    """run(**settings): the rows of the report. `rows`: how many instructions there are."""

    def call(rows=12, preset="", **settings):
        write_jsonl(f"{tmp_path}/in.jsonl", [{"prompt": f"Say {i}."} for i in range(rows)])
        config = get_config(preset)
        given = {"model": "seed-model", "input": f"{tmp_path}/in.jsonl", "output": f"{tmp_path}/out", "rounds": 3}
        config.update(given | settings)
        rounds.run_rounds(from_config_dict(rounds.RoundsConfig, config.to_dict()))
        return _lines(f"{tmp_path}/out/rounds.jsonl")

    return call


def instructions(tmp_path, number: int) -> list[int]:
    return [row["id"] for row in _lines(f"{tmp_path}/out/round_{number}/instructions.jsonl")]


def test_what_each_part_gets(run, parts, tmp_path):
    out, settings = f"{tmp_path}/out", {"respond": {"temperature": 0.9}, "perturb": {"ratio": 0.5}}
    rows = run(seed=7, pairs=settings, weights={"rules": "kl"}, train={"loss": {"beta": 0.2}}, preset="tiny")
    assert parts.names() == [(part, n) for n in (1, 2, 3) for part in ("pairs", "weights", "train")]
    models = ["seed-model", f"{out}/round_1/train", f"{out}/round_2/train"]
    for n, (pairs, weights, train) in enumerate(
        zip(*map(parts.configs, ("pairs", "weights", "train")), strict=True), 1
    ):
        here = f"{out}/round_{n}"
        assert [pairs.model, weights.model, train.model] == [models[n - 1]] * 3
        assert [pairs.seed, weights.seed, train.seed] == [6 + n] * 3
        assert train.reference is None and train.reference_cache is None and weights.store is None
        assert (pairs.input, pairs.output) == (f"{here}/instructions.jsonl", f"{here}/pairs.jsonl")
        assert (weights.input, weights.output) == (pairs.output, f"{here}/weighed.jsonl")
        assert (train.input, train.output) == (weights.output, f"{here}/train")
        assert pairs.respond.temperature == 0.9 and pairs.perturb.ratio == 0.5 and not pairs.endpoint.url
        assert weights.rules == "kl" and train.loss.beta == 0.2
        assert weights.max_length == train.max_length == 1024 and train.dtype == train.compute.dtype == "float32"
    assert [row["model"] for row in rows] == models and [row["round"] for row in rows] == [1, 2, 3]


def test_the_seed_as_reference(run, parts):
    run(reference="seed")
    assert [config.reference for config in parts.configs("train")] == [None, "seed-model", "seed-model"]


@pytest.mark.parametrize(
    ("settings", "weighs"),
    [
        ({"train": {"weights": "auto"}}, True),
        ({"train": {"weights": "store:pmi"}, "weights": {"rules": "kl,pmi"}}, True),
        ({"train": {"weights": "uniform"}}, False),
        ({"train": {"weights": "entropy"}}, False),
        ({"train": {"weights": "online:calibrated_entropy"}}, False),
        ({"pairs": {"method": "self_reward"}}, False),
    ],
)
def test_weighing_where_training_reads_it(run, parts, tmp_path, settings, weighs):
    run(rounds=1, **settings)
    assert (("weights", 1) in parts.names()) == weighs
    assert Path(parts.configs("train")[0].input).name == ("weighed.jsonl" if weighs else "pairs.jsonl")


def test_every_round_has_instructions_of_its_own(run, tmp_path):
    run(rows=14, seed=3)
    shares = [instructions(tmp_path, n) for n in (1, 2, 3)]
    assert [len(share) for share in shares] == [4, 4, 4] and len({*sum(shares, [])}) == 12
    assert all(share == sorted(share) for share in shares) and shares[0] != [0, 1, 2, 3]


def test_all_instructions_in_every_round(run, tmp_path):
    run(rows=2, instructions_per_round=0)
    assert [instructions(tmp_path, n) for n in (1, 2, 3)] == [[0, 1]] * 3


def test_instructions_that_the_model_invents(run, parts, tmp_path):
    run(input=None, num_instructions=5)
    assert [(c.input, c.num_instructions, c.seed) for c in parts.configs("pairs")] == [(None, 5, n) for n in range(3)]
    assert not (tmp_path / "out/round_1/instructions.jsonl").exists()


def test_more_rounds_follow(run, parts, tmp_path):
    run(rounds=2, instructions_per_round=3)
    first = [instructions(tmp_path, n) for n in (1, 2)]
    parts.called.clear()
    rows = run(rounds=4, instructions_per_round=3)
    assert parts.names() == [(part, n) for n in (3, 4) for part in ("pairs", "weights", "train")]
    assert [instructions(tmp_path, n) for n in (1, 2)] == first and [row["round"] for row in rows] == [1, 2, 3, 4]
    assert len({*sum((instructions(tmp_path, n) for n in (1, 2, 3, 4)), [])}) == 12


@pytest.mark.parametrize("part", ["pairs", "weights", "train"])
def test_a_part_that_fails(run, parts, tmp_path, part):
    """The error tells the round, and the setting as it is called here; called again, it goes on in that round."""
    parts.fault = part, 2
    key = "config.train.optim.learning_rate" if part == "train" else "config.optim.learning_rate"
    with pytest.raises(UserError, match=f"^round 2: {key} is bad and config.model too"):
        run()
    assert len(_lines(tmp_path / "out/rounds.jsonl")) == 1 and not (tmp_path / "out/round_2/round.json").exists()
    parts.fault = None
    parts.called.clear()
    assert len(run()) == 3 and parts.names()[0] == ("pairs", 2)
    parts.called.clear()
    assert len(run()) == 3 and not parts.called


def test_the_report(run, capsys):
    (row,) = run(rounds=1)
    assert capsys.readouterr().out == rounds_table([row]) + "\n"
    assert row.pop("seconds").keys() == {"pairs", "weights", "train"}
    # 11 pairs are left but only 6 were trained on: steps of two pairs each with the values 0, 1, 2
    means = {"loss": 1.0, "rewards/margins": 1.0, "rewards/accuracies": 1.0}
    assert row == {
        **{"round": 1, "model": "seed-model", "instructions": 12, "pairs": 11, "dropped": {"decompose/refusal": 1}},
        **{"steps": 3, **means, "eval_loss": 0.5},
    }
    assert rounds_table([row | {"seconds": {"pairs": 60.04, "train": 5.2}}]) == (
        "round  instructions  pairs  dropped  steps    loss  margin  accuracy  seconds\n"
        "    1            12     11        1      3  1.0000  1.0000    1.0000     65.2"
    )


def test_means_over_the_last_epoch(tmp_path):
    write_jsonl(f"{tmp_path}/pairs.jsonl.counts.json", [{"input": 9, "pairs": 3, "stages": []}])
    steps = [(1, 2, 8.0), (2, 1, 4.0), (3, 2, 1.0), (4, 1, 7.0)]
    names = ("loss", "rewards/margins", "rewards/accuracies")
    rows = [{"step": step, "pairs": pairs, **dict.fromkeys(names, value)} for step, pairs, value in steps]
    write_jsonl(f"{tmp_path}/train/metrics.jsonl", rows)
    found = summary(str(tmp_path))
    assert found["loss"] == pytest.approx((2 * 1.0 + 7.0) / 3) and found["steps"] == 4
    assert "nan" not in rounds_table([{"round": 1, **found, "seconds": {}}])


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"rounds": 0}, "config.rounds=0: must be at least 1"),
        ({"reference": "self"}, "config.reference='self': must be previous or seed"),
        ({"instructions_per_round": -1}, "config.instructions_per_round=-1"),
        ({"instructions_per_round": 5}, "has 12 instructions, too few for 3 rounds of 5"),
        ({"rows": 2}, "has 2 instructions, too few for 3 rounds of 1"),
        ({"input": None, "num_instructions": 3, "instructions_per_round": 2}, "config.instructions_per_round: divides"),
        ({"input": None}, "config.input=None and config.num_instructions=None"),
        ({"seed": 2**32 - 2}, "config.seed"),
        ({"pairs": {"num_examples": 0}}, "config.pairs.num_examples=0: must be at least 1"),
        ({"pairs": {"respond": {"temperature": -1.0}}}, "config.pairs.respond.temperature=-1.0"),
        ({"weights": {"rules": "best"}}, "config.weights.rules"),
        ({"train": {"batch": {"pairs": 0}}}, "config.train.batch.pairs: must be at least 1"),
        ({"train": {"loss": {"kind": "dpo"}}}, "config.train.loss"),
        ({"input": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"train": {"weights": "columns"}}, "config.train.weights=columns: the rounds' pairs bring no token scores"),
        ({"train": {"weights": "store:kl"}}, "config.train.weights=store:kl: config.weights.rules=calibrated_entropy"),
        (
            {"train": {"weights": "online"}, "pairs": {"method": "self_correct"}},
            "config.train.weights=online: the pairs of config.pairs.method=self_correct have no perturbed_prompt",
        ),
        ({"weights": {"max_length": 512}}, "config.weights.max_length=512 and config.train.max_length=2048"),
    ],
)
def test_settings(run, parts, tmp_path, settings, part):
    with pytest.raises(UserError) as raised:
        run(**settings)
    assert part in str(raised.value), raised.value
    assert not parts.called and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"train": {"optim": {"learning_rate": 1e-3}}}, "config.train.optim.learning_rate=5e-07, now 0.001"),
        ({"pairs": {"seed_": 1}}, "config.pairs.seed_: unknown key"),
        ({"reference": "seed"}, "config.reference='previous', now 'seed'"),
        ({"rounds": 2}, "config.instructions_per_round=4, now 6"),
        (
            {"rows": 13},
            "other rows than config.input={tmp_path}/in.jsonl holds now (12, now 13); put the old rows back",
        ),
        ({"model": "other"}, "on other weights than config.model=other holds now"),
        ({"weights": {"dtype": "bfloat16"}}, "config.weights.dtype='float32', now 'bfloat16'"),
    ],
)
def test_other_settings_are_refused(run, parts, tmp_path, changed, part):
    run()
    if "unknown" in part:  # as a caller without a config file may give them
        config = get_config().to_dict() | {"model": "m", "input": "i", "output": "o"}
        config["pairs"] |= changed["pairs"]
        with pytest.raises(UserError, match=part):
            from_config_dict(rounds.RoundsConfig, config)
        return
    with pytest.raises(UserError) as raised:
        run(**changed)
    assert part.format(tmp_path=tmp_path) in str(raised.value) and str(tmp_path / "out/config.json") in str(
        raised.value
    )
    parts.called.clear()
    run(train={"checkpoints": {"every": 7}}, pairs={"decode": {"slots": 2}, "mesh": {"fsdp": 1}})
    assert not parts.called


def test_a_directory_with_something_else(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        run()
    (tmp_path / "out/notes.txt").unlink()
    (tmp_path / "out/config.json").write_text(json.dumps({"command": "musc_train", "config": {}}))
    with pytest.raises(UserError, match="belongs to musc_train"):
        run()


def test_the_settings_are_those_of_the_three_commands():
    """Nothing is repeated in the config file, and what a round sets itself cannot be given."""
    from configs import musc_pairs, musc_token_weights, musc_train

    config = get_config("tiny").to_dict()
    for section, other in (("pairs", musc_pairs), ("weights", musc_token_weights), ("train", musc_train)):
        whole = (other.get_config() if section == "pairs" else other.get_config("tiny")).to_dict()
        own = {*whole} - {*config[section]}
        whole.get("checkpoints", {}).pop("remote", None)  # a copy is of one run
        assert config[section] == {key: value for key, value in whole.items() if key not in own}
        assert (
            {"model", "input", "output", "seed"}
            <= own
            <= {
                *("model", "input", "output", "seed", "num_instructions", "endpoint", "store", "reference"),
                *("reference_cache", "chat_template_kwargs"),
            }
        )
    changed = get_config()
    changed.train.dtype = "float32"
    assert changed.train.compute.dtype == "float32"  # a file's references hold in its section
