"""`launch.evaluate` as users start it: two models side by side, more tasks later, IFEval from files."""

import json

import pytest

from tests.checkpoints import make_checkpoint, make_tokenizer
from tests.e2e import common
from tests.e2e.common import arguments, fork
from tests.lm_eval_tasks import make_tasks

SMALL = ("max_length=64", "batch.row_length=128", "decode.slots=4", "limit=8")
PROMPTS = (
    {"prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {"prompt": "All small.", "instruction_id_list": ["change_case:english_lowercase"], "kwargs": [{}]},
)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    paths = []
    for seed, name in enumerate(("before", "after")):
        paths.append(str(tmp_path_factory.mktemp(name)))
        make_checkpoint(paths[-1], "llama", seed=seed)
        make_tokenizer(paths[-1])
    return paths


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> dict[str, str]:
    return make_tasks(tmp_path_factory.mktemp("tasks"), number=12)


def names(line: str, *parts: str) -> None:
    """The line names all of these."""
    assert [] == [part for part in parts if part not in line], line


@pytest.mark.slow
def test_two_models_and_then_another_task(models, tasks, tmp_path):
    output = tmp_path / "results"

    def evaluate(*settings):
        given = (f"models={','.join(models)}", f"output={output}", *SMALL, *settings)
        return fork("evaluate", *arguments("evaluate", *given))

    evaluate(f"tasks={tasks['choose']}").ok()
    done = {path: path.stat().st_mtime_ns for path in output.glob("*/*.json*")}
    assert len(done) == 4  # a result and the samples of each model
    told = evaluate(f"tasks={tasks['choose']},{tasks['write']}", "batch.rows=2").ok()
    assert {path: path.stat().st_mtime_ns for path in done} == done  # what was there was not run again
    assert len(list(output.glob("*/*.json*"))) == 8
    found = json.loads((output / "table.json").read_text())
    assert found["models"] == models
    assert {(row["task"], row["metric"]) for row in found["rows"]} == {
        ("local_choose", "acc"),
        ("local_choose", "acc_norm"),
        ("local_write", "exact_match"),
    }
    for row in found["rows"]:
        assert row["difference"] == row["values"][1] - row["values"][0]
    for column, model in enumerate(models):
        (samples,) = (p for p in done if p.suffix == ".jsonl" and p.parent.name == model.strip("/").replace("/", "__"))
        rows = common.read_rows(samples)
        assert len(rows) == 8
        assert found["rows"][0]["values"][column] == pytest.approx(sum(row["acc"] for row in rows) / 8)
    text = (output / "table.md").read_text()
    assert told.stdout.endswith(text) and text.startswith(f"| task | metric | {models[0]} | {models[1]} | difference |")
    line = evaluate(f"tasks={tasks['choose']}", "num_fewshot=1").error()
    names(line, "choose.yaml", "config.num_fewshot=None", "now 1", "another config.output")


@pytest.mark.slow
def test_what_tasks_are_refused(models, tmp_path):
    def refused(*settings) -> str:
        given = (f"models={models[0]}", f"output={tmp_path}/results", *SMALL, *settings)
        return fork("evaluate", *arguments("evaluate", *given)).error()

    names(refused("tasks=hellaswagg"), "'hellaswagg': no such task", "config.include_path")
    names(refused(f"tasks={tmp_path}/none.yaml"), "none.yaml: no such file")
    (tmp_path / "broken.yaml").write_text("task: broken\ndataset_path: json\n")
    names(refused(f"tasks={tmp_path}/broken.yaml"), "broken.yaml: cannot be loaded", "check the file")
    names(refused("tasks=arc_easy", f"include_path={tmp_path}/none"), "config.include_path", "no such directory")
    names(refused("tasks="), "config.tasks: empty")
    names(refused("tasks=a,a"), "config.tasks: a is given twice")
    names(refused("tasks=a", "limit=0"), "config.limit=0")
    names(refused("tasks=a", "batch.row_length=64"), "config.batch.row_length=64", "config.max_length=64")
    names(refused("tasks=a", f"models={tmp_path}/none"), "no such")
    assert not (tmp_path / "results").exists()


def test_ifeval_from_files(tmp_path):
    def evaluate(*rows, **settings):
        prompts = common.write_rows(tmp_path / "prompts.jsonl", list(PROMPTS))
        responses = common.write_rows(tmp_path / "responses.jsonl", list(rows))
        given = {"prompts": prompts, "responses": responses, "output": f"{tmp_path}/ifeval.json", **settings}
        return fork("evaluate", *arguments("evaluate", *(f"{k}={v}" for k, v in given.items()), preset="ifeval_files"))

    answers = [
        {"prompt": "All small.", "response": "Not all of it is small."},
        {"prompt": "No commas.", "response": "Yes."},
    ]
    done = evaluate(*answers).ok()
    scores = json.loads((tmp_path / "ifeval.json").read_text())
    assert scores["prompt_level_strict_acc"] == scores["inst_level_loose_acc"] == 0.5
    assert json.loads(done.stdout)["prompt_level_strict_acc"] == 0.5
    names(evaluate(answers[0]).error(), "1 of 2 prompts", "config.allow_missing=true")
    (tmp_path / "ifeval.json").unlink()
    evaluate(answers[0], allow_missing="true").ok()
    assert json.loads((tmp_path / "ifeval.json").read_text())["num_missing"] == 1
    names(evaluate(*answers, output=f"{tmp_path}/prompts.jsonl").error(), "config.prompts itself")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "No commas.", "response": "Yes."}\n{"prompt": \n')
    names(evaluate(*answers, responses=f"{tmp_path}/broken.jsonl").error(), "broken.jsonl:2", "broken JSON")
    names(evaluate(*answers, models="x").error(), "unknown key")
