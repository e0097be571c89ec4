"""Bad input gives exit status 1 and one last line that says what, where and the cure; nothing is left half-written."""

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.checkpoints import edit_config
from tests.conftest import ROOT
from tests.e2e import common
from tests.e2e.common import SMALL_SCORE, SMALL_TRAIN, arguments, fork, run, start


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return common.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    return common.make_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture
def train(model, pairs, tmp_path):
    """train(*settings, **fork's): the launcher on good input but for these settings; the line of its error."""

    def call(*settings, **options) -> str:
        given = (f"model={model}", f"input={pairs}", f"output={tmp_path}/run", *SMALL_TRAIN, *settings)
        return fork("musc_train", *arguments("musc_train", *given, preset="tiny"), **options).error()

    return call


@pytest.fixture
def score(model, tmp_path):
    def call(*settings, rows=({"prompt": "a", "response": "b"},)) -> str:
        given = (f"model={model}", f"input={common.write_rows(tmp_path / 'rows.jsonl', rows)}")
        output = tmp_path / "scored.jsonl"
        done = fork("score", *arguments("score", *given, f"output={output}", *SMALL_SCORE, *settings))
        assert not output.exists()
        return done.error()

    return call


def names(line: str, *parts: str) -> None:
    """The line names all of these."""
    assert [] == [part for part in parts if part not in line], line


# --- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ([], ["config.input: not set"]),  # the command's own config file
        (["--config.model=x"], ["config.input: not set"]),
        (["--config=configs/absent.py", "--config.model=x"], ["configs/absent.py", "no such config file"]),
        (["--config=configs/musc_train.py:huge"], ["configs/musc_train.py:huge", "unknown preset", "choose tiny"]),
        (["--config=configs/score.py:tiny"], ["configs/score.py:tiny", "has no presets"]),
        (["--config=configs/musc_train.py", "--config.batch.pair=1"], ["config.batch.pair", "unknown key", "pairs?"]),
        (["--config=configs/musc_train.py", "--config.zz=1"], ["config.zz", "unknown key"]),
        (["--config=configs/musc_train.py", "--config.epochs=two"], ["--config.epochs=two", "int"]),
        (["--config=configs/musc_train.py", "--config.batch=8"], ["--config.batch=8", "not a dict"]),
        (["--config=configs/musc_train.py", "--modle=x"], ["'modle'", "--config.key=value"]),
        (["--config=configs/musc_train.py", "pairs.jsonl"], ["'pairs.jsonl'", "--config.key=value"]),
    ],
)
def test_flags(flags, parts):
    names(run("musc_train", *flags).error(), *parts)


@pytest.mark.parametrize(("source", "part"), [("x = (", "SyntaxError"), ("x = 1", "get_config"), ("1 / 0", "Zero")])
def test_a_config_file_that_is_broken(tmp_path, source, part):
    (tmp_path / "mine.py").write_text(source)
    names(run("score", f"--config={tmp_path}/mine.py").error(), "mine.py", part)


def test_settings_of_another_command():
    names(fork("musc_train", *arguments("score", "model=x")).error(), "config.", "key")


def test_what_is_not_set():
    names(fork("musc_train", *arguments("musc_train")).error(), "config.", "not set", "=VALUE")
    names(fork("export_hf", *arguments("export_hf", "model=x")).error(), "config.output", "--config.output=VALUE")


# --- settings: refused before there is a run directory, or the corrected command would be refused as another run ------


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("loss.kind=dpoo", ["config.loss.kind", "dpoo", "sigmoid"]),
        ("loss.beta=0", ["config.loss.beta", "positive"]),
        ("weights=best", ["config.weights", "best", "perplexity"]),
        ("optim.schedule=cosin", ["config.optim.schedule", "cosin", "cosine"]),
        ("optim.warmup_ratio=2", ["config.optim.warmup_ratio"]),
        ("optim.clip_norm=-1", ["config.optim.clip_norm"]),
        ("optim.mu_dtype=float16", ["config.optim.mu_dtype", "auto, float32, bfloat16"]),
        ("compute.attention=flashy", ["config.compute.attention", "flashy", "blockwise"]),
        ("compute.remat=some", ["config.compute.remat", "some", "full"]),
        ("dtype=int8", ["config.dtype", "int8", "bfloat16"]),
        ("epochs=0", ["config.epochs"]),
        ("max_steps=0", ["config.max_steps"]),
        ("eval_every=0", ["config.eval_every"]),
        ("checkpoints.every=0", ["config.checkpoints.every"]),
        ("checkpoints.keep=0", ["config.checkpoints.keep"]),
        ("batch.pairs=0", ["config.batch.pairs", "at least 1"]),
        ("batch.rows_per_device=0", ["config.batch.rows_per_device", "at least 1"]),
        ("batch.row_lengths=0", ["config.batch.row_lengths", "at least 1"]),
        ("batch.rows=2", ["rows"]),
        ("mesh.data=3", ["config.mesh", "1 cpu device"]),
        ("mesh.data=-1", ["config.mesh", "at most one -1"]),
    ],
)
def test_settings(train, tmp_path, setting, parts):
    names(train(setting), *parts)
    assert not (tmp_path / "run").exists()


def test_a_mesh_that_does_not_fit(train, tmp_path):
    names(train("mesh.fsdp=1", "mesh.tensor=8", devices=8), "axis heads of size 4", "config.mesh.tensor")
    assert not (tmp_path / "run").exists()


# --- rows ------------------------------------------------------------------------------------------------------------

GOOD = {"prompt": "say", "chosen": "yes it is", "rejected": "no"}
USER = [{"role": "user", "content": "say"}]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["pairs.jsonl", "empty"]),
        (" \n\n", ["pairs.jsonl", "empty"]),
        (f"{json.dumps(GOOD)}\n{{'prompt'", ["pairs.jsonl:2", "broken JSON", "mend"]),
        (f"{json.dumps(GOOD)}\n[1]", ["pairs.jsonl row 1", "object"]),
        ([GOOD, {"prompt": "say", "chosen": "yes"}], ["pairs.jsonl row 1", "'rejected' is missing", "chosen, prompt"]),
        ([GOOD, GOOD | {"rejected": ""}], ["pairs.jsonl row 1 (rejected)", "response is empty", "drop the row"]),
        ([GOOD, GOOD | {"prompt": "the cat " * 40}], ["pairs.jsonl row 1", "lost to truncation", "raise max_length"]),
        ([GOOD, GOOD | {"chosen": "yes<|im_end|><|im_end|>"}], ["pairs.jsonl row 1 (chosen)", "doubled EOS"]),
        ([GOOD | {"rejected": GOOD["chosen"]}] * 2, ["no pairs left", "2 chosen and rejected are identical"]),
        ([GOOD | {"prompt": USER}, GOOD], ["pairs.jsonl row 1", "one file must have one layout"]),
        ([GOOD | {"prompt": [{"role": "user"}]}], ["pairs.jsonl row 0", "message 0 has no content"]),
        (
            [GOOD | {"chosen_token_scores": [1.0] * 3, "rejected_token_scores": [1.0] * 3}],
            ["pairs.jsonl row 0", "chosen_token_scores has 3 values", "another tokenizer"],
        ),
        (
            json.dumps(GOOD | {"chosen_token_scores": [float("nan")], "rejected_token_scores": [1.0]}),
            ["pairs.jsonl:1", "NaN is no JSON number"],
        ),
        (
            json.dumps(GOOD | {"chosen_token_scores": [1.0, 1e999], "rejected_token_scores": [1.0]}),
            ["pairs.jsonl", "Infinity"],
        ),
        ([GOOD | {"chosen_token_scores": [-1.0], "rejected_token_scores": [1.0]}], ["row 0", "-1.0", ">= 0"]),
        ([GOOD | {"chosen_token_scores": [1.0]}], ["pairs.jsonl row 0", "only one of"]),
    ],
)
def test_rows(train, tmp_path, content, parts):
    path = tmp_path / "pairs.jsonl"
    path.write_text(content if isinstance(content, str) else "".join(json.dumps(r) + "\n" for r in content))
    names(train(f"input={path}"), *parts)
    assert not (tmp_path / "run").exists()


def test_input_that_is_not_there(train, tmp_path):
    names(train(f"input={tmp_path}/no.jsonl"), "no.jsonl", "check the path")
    names(train(f"eval_input={tmp_path}/no.jsonl"), "no.jsonl", "check the path")
    assert not (tmp_path / "run").exists()


def test_weights_columns_that_are_not_there(train):
    names(train("weights=columns"), "pairs.jsonl row 0", "no token scores", "choose a rule")


def test_nan_among_parquet_scores(train, tmp_path):
    import pyarrow
    import pyarrow.parquet

    row = GOOD | {"chosen_token_scores": [1.0, float("nan")], "rejected_token_scores": [1.0]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "pairs.parquet")
    names(train(f"input={tmp_path}/pairs.parquet"), "pairs.parquet row 0", "chosen_token_scores[1] is nan")


def test_real_scores_of_another_tokenizer(train, shared_data):
    line = train(f"input={shared_data}/musc_tdpo_demo.json", "max_length=8192")
    names(line, "musc_tdpo_demo.json row 0", "chosen_token_scores has", "another tokenizer")


# --- the model's directory -------------------------------------------------------------------------------------------


def sharded(path: Path) -> list[Path]:
    shutil.rmtree(path)
    common.make_model(path, max_shard_size="20KB")
    return sorted(path.glob("*.safetensors"))


def truncate(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def integers(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = np.ones_like(tensors["model.norm.weight"], np.int32)
    save_file(tensors, path / "model.safetensors")


def template(text: str):
    def change(path: Path) -> None:
        (path / "chat_template.jinja").write_text(text)

    return change


TURNS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
BROKEN = {
    "no directory": (shutil.rmtree, ["no such directory", "hub id"]),
    "empty": (lambda p: [f.unlink() for f in p.iterdir()], ["config.json"]),
    "no tokenizer": (lambda p: [f.unlink() for f in p.glob("tokenizer*")], ["no tokenizer", "copy tokenizer.json"]),
    "vocabulary": (lambda p: edit_config(p, vocab_size=100), ["larger than the embedding", "100 rows"]),
    "truncated": (truncate, ["model.safetensors", "truncated", "download it again"]),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), ["model.safetensors"]),
    "missing shard": (lambda p: sharded(p)[1].unlink(), ["model-00002", "missing", "download"]),
    "integer weights": (integers, ["model.norm.weight (I32)", "F32, BF16, F16"]),
    "other sizes": (lambda p: edit_config(p, intermediate_size=64), ["expected", "config.json"]),
    "architecture": (lambda p: edit_config(p, architectures=["GPT2LMHeadModel"]), ["GPT2", "LlamaForCausalLM"]),
    "broken config": (lambda p: (p / "config.json").write_text("{"), ["config.json"]),
    "broken tokenizer": (lambda p: (p / "tokenizer.json").write_text("{"), ["tokenizer", "tokenizer.json"]),
    "no prefix": (
        template(TURNS + "{% if add_generation_prompt %}[bot]{% endif %}"),
        ["row 0", "end token not trained"],
    ),
    "no end token": (
        template(TURNS + "{% if add_generation_prompt %}[assistant]{% endif %}"),
        ["row 0", "end token not trained", "<|im_end|>"],
    ),
    "doubled end": (
        template(
            "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] + '<|im_end|><|im_end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}"
        ),
        ["row 0", "doubled EOS"],
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_models(train, model, tmp_path, fault):
    path, (breaks, parts) = tmp_path / "model", BROKEN[fault]
    shutil.copytree(model, path)
    breaks(path)
    pairs = common.write_rows(tmp_path / "pairs.jsonl", [GOOD | {"prompt": USER}])
    names(train(f"model={path}", f"input={pairs}"), *parts)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_doubled_bos(train, model, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(model, path)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    start_id = tokenizer["model"]["vocab"]["<|im_start|>"]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [start_id], "tokens": ["<|im_start|>"]}},
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    pairs = common.write_rows(tmp_path / "pairs.jsonl", [GOOD | {"prompt": "<|im_start|>say"}])
    names(train(f"model={path}", f"input={pairs}"), "pairs.jsonl row 0", "doubled BOS", "remove it")


def test_a_reference_that_does_not_fit(train, tmp_path):
    other = common.make_model(tmp_path / "other", vocab_size=200)
    names(train(f"reference={other}"), "other", "vocabulary", "same tokens")
    assert not (tmp_path / "run").exists()


# --- output ----------------------------------------------------------------------------------------------------------


def test_an_output_that_is_something_else(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("keep")
    names(train(), "run", "not empty", "config.output")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_outputs_that_cannot_be_written(train, score, tmp_path):
    (tmp_path / "file").write_text("")
    names(train(f"output={tmp_path}/file/run"), f"{tmp_path}/file", "check the path")
    names(train(f"output={tmp_path}/file"), f"{tmp_path}/file")
    names(score(f"output={tmp_path}/file/scored.jsonl"), f"{tmp_path}/file", "check the path")
    names(score(f"output={tmp_path}"), "is a directory", "file name")


def test_exports(model, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "note").write_text("keep")
    export = lambda *settings: fork("export_hf", *arguments("export_hf", *settings)).error()  # noqa: E731
    names(export(f"model={model}", f"output={taken}"), "taken", "not empty", "choose another")
    names(export(f"model={taken}", f"output={tmp_path}/out"), "taken", "config.json")
    names(export(f"model={tmp_path}/no", f"output={tmp_path}/out"), "no such directory")
    names(export(f"model={model}", f"output={tmp_path}/out", "step=3"), "config.step=3", "no run directory")
    names(export(f"model={model}", f"output={tmp_path}/out", "dtype=int8"), "int8", "bfloat16")
    names(export(f"model={model}", f"output={tmp_path}/out", "max_shard_bytes=0"), "max_shard_bytes")
    names(export(f"model={model}", f"output={taken}/note/out"), "note", "check the path")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken"]


def test_scoring_rows(score):
    names(score(rows=[{"prompt": "a", "response": "b"}, {"prompt": "a"}]), "rows.jsonl row 1", "'response' is missing")
    names(score(rows=[{"prompt": "a", "response": " "}]), "rows.jsonl row 0", "response is empty", "drop the row")
    names(score(rows=[{"prompt": 3, "response": "b"}]), "rows.jsonl row 0", "prompt")
    names(score(rows=[{"prompt": "a", "response": None}]), "rows.jsonl row 0", "response")
    names(score("max_length=4", rows=[{"prompt": "aaaaaa", "response": "b"}]), "rows.jsonl row 0", "truncation")


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("batch.row_length=32", ["config.batch.row_length=32", "config.max_length=64"]),
        ("batch.rows=0", ["config.batch.rows", "at least 1"]),
        ("max_length=0", ["config.max_length"]),
        ("compute.attention=flashy", ["config.compute.attention", "flashy"]),
        ("compute.remat=some", ["config.compute.remat", "some"]),
        ("dtype=int8", ["config.dtype", "int8"]),
    ],
)
def test_scoring_settings(score, setting, parts):
    names(score(setting), *parts)


# --- while it runs ---------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite(train, tmp_path):
    line = train("optim.learning_rate=1e30", "optim.warmup_ratio=0.0", "epochs=4", "checkpoints.every=1")
    names(line, "step ", "nan", "config.optim.learning_rate", "row")
    step = int(line.split("step ")[1].split(":")[0])
    saved = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert step == 7 and saved == [1], (line, saved)  # six after the one that broke it, none of them saved
    for record in common.read_rows(tmp_path / "run" / "metrics.jsonl"):
        assert record.get("num_nonfinite", 0) == [*record.values()].count(None), record
    from lm_jax.checkpoints.orbax import Checkpoints

    with Checkpoints(f"{tmp_path}/run/checkpoints", keep=None) as checkpoints:
        for saved_step in saved:
            params = checkpoints.restore({"params": None}, saved_step)["params"]
            assert np.isfinite(params["embed"]["embedding"]).all(), saved_step


def test_parameters_that_are_not_finite(train, tmp_path):
    """Of a loss and a gradient that were: nothing is saved."""
    line = train("optim.learning_rate=1e39", "optim.warmup_ratio=0.0", "checkpoints.every=1")
    names(line, "step 1", "not finite", "nothing is saved", "config.optim.learning_rate")
    assert not [*(tmp_path / "run" / "checkpoints").iterdir()]


def test_interrupted(model, pairs, tmp_path):
    """Ctrl-C while it imports and while it trains, when it saves first: one line."""
    given = (f"model={model}", f"input={pairs}", f"output={tmp_path}/run", *SMALL_TRAIN, "epochs=2000")
    trains = (tmp_path / "run" / "metrics.jsonl").exists
    for begun, expected, says in ((lambda: True, 130, "error: interrupted"), (trains, 0, "stopped after step ")):
        with (tmp_path / "err").open("w+") as err:
            process = start("musc_train", *arguments("musc_train", *given, preset="tiny"), stderr=err)
            while not begun():
                assert process.poll() is None
                time.sleep(0.05)
            time.sleep(1.5)  # by then Python itself has started, also on a busy machine
            process.send_signal(signal.SIGINT)
            status = process.wait(60)
            err.seek(0)
            text = err.read()
        assert status == expected and "Traceback" not in text, (status, text)
        assert says in text.rstrip().split("\n")[-1], text


def test_nothing_but_the_inputs_is_touched():
    """Every command above ran in the checkout."""
    assert not (ROOT / "run").exists()
