"""Input made to harm, through the real commands, and secrets that must stay in the environment."""

import json
import shutil
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.checkpoints import edit_config
from tests.e2e import common
from tests.e2e.common import SMALL_SCORE, SMALL_TRAIN, arguments, fork
from tests.http_server import Reply, Server, completion

SECRETS = {
    "OPENAI_API_KEY": "sk-planted-0123456789",
    "HF_TOKEN": "hf_planted0123456789",
    "WANDB_API_KEY": "planted0123456789abcdef",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow",
}
ROW = {"prompt": [{"role": "user", "content": "say"}], "response": "yes"}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return common.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(source, tmp_path):
    return shutil.copytree(source, tmp_path / "model")


@pytest.fixture
def score(tmp_path, model):
    """score(row): the line of the error, which comes at once and leaves nothing behind."""

    def call(row=ROW) -> str:
        given = common.write_rows(tmp_path / "rows.jsonl", [row])
        output, begun = tmp_path / "scored.jsonl", time.monotonic()
        done = fork("score", *arguments("score", f"model={model}", f"input={given}", f"output={output}", *SMALL_SCORE))
        assert not output.exists() and time.monotonic() - begun < 60
        assert done.stderr.replace("\n", "").isprintable()
        return done.error(noise=True)

    return call


def test_numbers_that_are_none(score, model):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, model / "model.safetensors")
    assert "model.layers.1.mlp.up_proj.weight has NaN" in score()


def test_code_in_a_checkpoint(score, model):
    (model / "evil.py").write_text(f"open({str(model / 'executed')!r}, 'w')")
    edit_config(model, auto_map={"AutoModelForCausalLM": "evil.Model"})
    assert "remote code is never run" in score()
    assert not (model / "executed").exists()


def test_sizes_that_no_memory_holds(score, model):
    edit_config(model, num_hidden_layers=10**12)
    assert "num_hidden_layers=1000000000000" in score()


@pytest.mark.parametrize("attack", ["{{ ''.__class__.__mro__ }}", "{% for i in range(10**12) %}{% endfor %}"])
def test_templates(score, model, attack):
    (model / "chat_template.jinja").write_text(attack)
    line = score()
    assert "rows.jsonl row 0" in line and "chat template refuses" in line


@pytest.mark.parametrize("name", ["\x1b[2J\x1b]0;owned\x07", "\ud800", "\u202e", "x" * 10**6])
def test_text_of_others_in_an_error(score, name):
    line = score({name: 1, "prompt": "say"})
    assert ("half a surrogate pair" if name == "\ud800" else "'response' is missing") in line


def test_what_json_cannot_hold_is_seen_before_the_scoring(score):
    assert "row 0" in score(ROW | {"note": "\ud800"})


def no_secret_in(directory, *texts: str) -> None:
    """Nor in any file's name, whole or in part."""
    files = [p for p in directory.rglob("*") if p.is_file()]
    assert files
    for text in [*texts, *(str(p) for p in files), *(p.read_bytes().decode("latin-1") for p in files)]:
        assert [] == [secret for secret in SECRETS.values() if secret in text]


@pytest.mark.slow
def test_secrets_of_a_training(source, tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    pairs = common.make_pairs(tmp_path / "pairs.jsonl", 4)
    given = (f"model={source}", f"input={pairs}", f"output={tmp_path}/run", *SMALL_TRAIN, "max_steps=1")
    done = common.run("musc_train", *arguments("musc_train", *given, preset="tiny")).ok()
    exported = common.run("export_hf", *arguments("export_hf", f"model={tmp_path}/run", f"output={tmp_path}/out")).ok()
    no_secret_in(tmp_path, done.stdout, done.stderr, exported.stdout, exported.stderr)
    assert (tmp_path / "out" / "README.md").exists()


@pytest.mark.parametrize("status", [200, 400, 401])
def test_secrets_of_an_endpoint(tmp_path, monkeypatch, status):
    """A server that says the key back, in an answer's error or in its headers."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    said = {"error": {"message": f"the key {SECRETS['OPENAI_API_KEY']} is wrong"}}
    script = completion if status == 200 else lambda asked: Reply(said, status, {"x-key": SECRETS["OPENAI_API_KEY"]})
    prompts = common.write_rows(tmp_path / "prompts.jsonl", [{"prompt": "say"}])
    with Server(script) as server:
        given = (f"input={prompts}", f"output={tmp_path}/out.jsonl", f"endpoint.url={server.url}", "endpoint.model=m")
        done = common.run("generate", *arguments("generate", *given))
        assert server.asked[0].headers["authorization"] == f"Bearer {SECRETS['OPENAI_API_KEY']}"
    assert done.status == (0 if status == 200 else 1), done.stderr
    no_secret_in(tmp_path, done.stdout, done.stderr)


def test_a_key_in_an_address(tmp_path):
    prompts = common.write_rows(tmp_path / "prompts.jsonl", [{"prompt": "say"}])
    url = f"http://user:{SECRETS['OPENAI_API_KEY']}@localhost:1/v1"
    given = (f"input={prompts}", f"output={tmp_path}/out.jsonl", f"endpoint.url={url}", "endpoint.model=m")
    done = common.run("generate", *arguments("generate", *given))
    assert "OPENAI_API_KEY" in done.error() and json.dumps(url) not in done.stderr
    no_secret_in(tmp_path, done.stdout, done.stderr)
