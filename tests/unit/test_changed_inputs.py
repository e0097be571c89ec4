"""What a training run is made from: begun, and the same command again on rows or weights that changed meanwhile.

Training itself is left out: a run is refused, or goes on, before it. tests/e2e/test_changed_inputs.py trains.
"""

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import main_train as main_config
from configs import musc_train as musc_config
from lm_jax.config import from_config_dict
from lm_jax.errors import UserError
from lm_jax.training.trainer import Trainer
from main_jax.training import command as main_train
from musc_jax.training import command as musc_train
from tests.checkpoints import CHATML
from tests.e2e import common
from tests.e2e.test_main_train import make_rows

COMMANDS = {
    "musc_train": (musc_train, musc_train.MuscTrainConfig, musc_config),
    "main_train": (main_train, main_train.MainTrainConfig, main_config),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return common.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def place(tmp_path, model) -> Path:
    """With what a command reads: a policy, a reference, rows of each kind."""
    for name in ("model", "ref"):
        shutil.copytree(model, tmp_path / name)
    common.make_pairs(tmp_path / "musc_train.jsonl", 24, perturbed_prompt=lambda i: f"say that {i} sat")
    common.make_pairs(tmp_path / "held_out.jsonl", 4)
    make_rows(tmp_path / "main_train.jsonl", 24)
    return tmp_path


@pytest.fixture
def begin(place, monkeypatch):
    """begin(command, **settings): the command, to where its training would begin."""
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: None)
    monkeypatch.setattr(musc_train, "_examples", lambda config, rule, trainer, reference, read: [[] for _ in read])

    def call(command: str, **settings):
        module, kind, file = COMMANDS[command]
        config = file.get_config("tiny")
        given = {"model": f"{place}/model", "input": f"{place}/{command}.jsonl", "output": f"{place}/out"}
        config.update(given | {"max_length": 96} | settings)
        module.train(from_config_dict(kind, config.to_dict()))

    return call


def refused(call, *args, **settings) -> str:
    with pytest.raises(UserError) as raised:
        call(*args, **settings)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def edited(rows):
    column = "chosen" if "chosen" in rows[5] else "response"
    return [*rows[:5], {**rows[5], column: "no cats"}, *rows[6:]]


CHANGES = {
    "edited": (edited, "(24 as now, but not the same)"),
    "appended": (lambda rows: [*rows, rows[0]], "(24, now 25)"),
    "removed": (lambda rows: rows[:-1], "(24, now 23)"),
    "reordered": (lambda rows: [rows[1], rows[0], *rows[2:]], "(24 as now, but not the same)"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("command", COMMANDS)
def test_other_rows(place, begin, command, change):
    begin(command)
    path, (make, told) = place / f"{command}.jsonl", CHANGES[change]
    rows = common.read_rows(path)
    common.write_rows(path, make(rows))
    line = refused(begin, command)
    assert f"{place}/out/config.json: this run was begun with other rows than config.input={path} holds now" in line
    assert told in line and line.endswith("put the old rows back, or give another config.output")
    common.write_rows(path, rows)
    begin(command)  # the cure


def as_parquet(path: Path, rows) -> Path:
    names = dict.fromkeys(name for row in rows for name in row)
    pq.write_table(pa.Table.from_pylist([{n: row.get(n) for n in names} for row in rows]), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def with_other_columns(path: Path, rows) -> Path:
    common.write_rows(path, [{"note": i, **dict(reversed(row.items()))} for i, row in enumerate(rows)])
    return path


def with_rows_that_are_dropped(path: Path, rows) -> Path:
    nothing = {"chosen": "b", "rejected": "b"} if "chosen" in rows[0] else {"response": "b", "weight": 0}
    common.write_rows(path, [*rows, {"prompt": "a", **nothing}])
    return path


def cut_behind_max_length(path: Path, rows) -> Path:
    """The last row's answer goes on beyond what is learnt of it."""
    column = "chosen" if "chosen" in rows[0] else "response"
    common.write_rows(path, [*rows[:-1], {**rows[-1], column: rows[-1][column] + "!"}])
    return path


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("rewrite", [as_parquet, with_other_columns, with_rows_that_are_dropped, cut_behind_max_length])
def test_the_same_rows_in_another_form(place, begin, command, rewrite):
    path = place / f"{command}.jsonl"
    rows = common.read_rows(path)
    rows[-1]["chosen" if "chosen" in rows[-1] else "response"] = "so many words that they are cut " * 9
    common.write_rows(path, rows)
    begin(command)
    begin(command, input=str(rewrite(path, rows)))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_is_what_it_holds(place, begin, command):
    begin(command)
    for file in (place / "model").iterdir():
        os.utime(file, (1, 1))
    begin(command)
    (place / "model").rename(place / "moved")
    begin(command, model=f"{place}/moved")
    common.make_model(place / "moved", seed=1)
    line = refused(begin, command, model=f"{place}/moved")
    assert f"begun on other weights than config.model={place}/moved holds now; put those back, or give another" in line


def test_another_template_is_no_fault_of_the_rows(place, begin):
    def messages(role: str, text: str) -> list:
        return [{"role": role, "content": text}]

    rows = common.read_rows(place / "held_out.jsonl")
    sides = ("chosen", "rejected")
    pairs = [
        {"prompt": messages("user", r["prompt"]), **{side: messages("assistant", r[side]) for side in sides}}
        for r in rows
    ]
    common.write_rows(place / "musc_train.jsonl", pairs)
    begin("musc_train")
    template = place / "model/chat_template.jinja"
    assert template.read_text() == CHATML
    template.write_text(CHATML.replace("'\n' + m", "':\n' + m").replace("assistant\n", "assistant:\n"))
    assert "the tokenizer or chat template that reads config.input=" in refused(begin, "musc_train")


def change_held_out(place: Path):
    common.write_rows(place / "held_out.jsonl", common.read_rows(place / "held_out.jsonl")[:-1])


def change_perturbed(place: Path):
    first, *rest = common.read_rows(place / "musc_train.jsonl")
    common.write_rows(place / "musc_train.jsonl", [{**first, "perturbed_prompt": "say"}, *rest])


def change_model(place: Path):
    common.make_model(place / "model", seed=1)


def change_reference(place: Path):
    common.make_model(place / "ref", seed=1)


@pytest.mark.parametrize(
    ("settings", "change", "part"),
    [
        ({"eval_input": "{}/held_out.jsonl"}, change_held_out, "other rows than config.eval_input={}/held_out.jsonl"),
        ({"weights": "online"}, change_perturbed, "other rows than config.input={}/musc_train.jsonl"),
        ({"reference": "{}/ref"}, change_reference, "other weights than config.reference={}/ref"),
        ({"reference": None}, change_model, "other weights than config.model={}/model"),
    ],
)
def test_all_that_training_reads(place, begin, settings, change, part):
    given = {key: value and value.format(place) for key, value in settings.items()}
    begin("musc_train", **given)
    begin("musc_train", **given)
    change(place)
    assert part.format(place) in refused(begin, "musc_train", **given)


def test_what_training_does_not_read_may_change(place, begin):
    """Perturbed prompts without weights that are made of them; a reference whose numbers no loss reads."""
    given = {"loss": {"kind": "simpo"}, "reference": f"{place}/ref"}
    begin("musc_train", **given)
    change_perturbed(place)
    change_reference(place)
    begin("musc_train", **given)


def test_token_scores_of_the_rows(place, begin):
    path = place / "musc_train.jsonl"
    rows = [
        {**row, "chosen": "a", "rejected": "b", "chosen_token_scores": [1.0, 0.5], "rejected_token_scores": [2.0, 1.0]}
        for row in common.read_rows(path)
    ]
    common.write_rows(path, rows)
    begin("musc_train", weights="columns")
    begin("musc_train", weights="columns")
    common.write_rows(path, [*rows[:-1], {**rows[-1], "rejected_token_scores": [2.0, 1.25]}])
    assert "other rows than config.input=" in refused(begin, "musc_train", weights="columns")


def test_an_evaluation_is_neither_added_nor_left_out(place, begin):
    held_out = f"{place}/held_out.jsonl"
    begin("musc_train")
    assert f"begun without config.eval_input={held_out}; leave it out" in refused(
        begin, "musc_train", eval_input=held_out
    )
    begin("musc_train", eval_input=held_out, output=f"{place}/other")
    line = refused(begin, "musc_train", output=f"{place}/other")
    assert f"begun with config.eval_input='{held_out}', now None" in line


def test_a_run_of_an_older_version_is_named(place, begin):
    begin("main_train")
    settings = json.loads((place / "out/config.json").read_text())
    del settings["made_from"]
    (place / "out/config.json").write_text(json.dumps(settings))
    assert "begun by an older version" in refused(begin, "main_train")
