"""Model cards: the hub reads their front matter, nothing in them breaks out of its place; and the way to the hub."""

import json
import runpy
import sys

import pytest
from huggingface_hub import HfApi, ModelCard, constants

from lm_jax.checkpoints import hf as hf_io
from lm_jax.checkpoints.export import ExportConfig, export
from lm_jax.checkpoints.hub import check_push, push
from lm_jax.checkpoints.model_card import model_card
from lm_jax.checkpoints.provenance import made_with, origin
from lm_jax.config import from_config_dict
from lm_jax.errors import UserError
from tests.checkpoints import make_checkpoint
from tests.http_server import Reply, Server

RECORDS = [
    {"step": 1, "loss": 0.6931, "rewards/margins": 0.0, "tokens_per_second": 5.0},
    {"step": 2, "loss": 0.5, "rewards/margins": 0.25, "num_tokens": 90, "tokens_per_second": 5.0},
    {"step": 2, "eval_loss": 0.45},
    {"step": 3, "loss": 0.125, "rewards/margins": 9.0},
]


def settings(**changes):
    config = {
        "model": "meta-llama/Llama-3.2-1B",
        "input": "org/pairs:train",
        "eval_input": None,
        "optim": {"learning_rate": 5e-6},
        "lora": {"rank": 0},
        **changes.pop("config", {}),
    }
    return {
        "command": "musc_train",
        "config": config,
        "method": {"summary": "Token-aware ([arXiv 2502.11541](https://arxiv.org/abs/2502.11541)).", "tags": ["musc"]},
        "origin": {
            "base_model": "meta-llama/Llama-3.2-1B",
            "license": {"license": "llama3.2"},
            "datasets": ["org/pairs"],
        },
        "made_with": {
            "command_line": "python -m launch.musc_train --config.seed=1",
            "versions": {"python": "3.11.7", "jax": "0.10.2"},
            "devices": "8 x TPU v5e",
        },
        **changes,
    }


def test_the_front_matter():
    data = ModelCard(model_card("org/name", settings(), 2, RECORDS, False)).data.to_dict()
    assert data == {
        "base_model": "meta-llama/Llama-3.2-1B",
        "datasets": ["org/pairs"],
        "library_name": "transformers",
        "license": "llama3.2",
        "pipeline_tag": "text-generation",
        "tags": ["musc", "jax"],
    }


def test_adapters():
    lora = {"lora": {"rank": 4}}
    data = ModelCard(text := model_card("org/name", settings(config=lora), 2, RECORDS, True)).data
    assert (data.library_name, data.base_model, data.tags) == (
        "peft",
        "meta-llama/Llama-3.2-1B",
        ["musc", "lora", "jax"],
    )
    assert "AutoModelForCausalLM.from_pretrained('meta-llama/Llama-3.2-1B'), 'org/name')" in text
    # On a run they fit that run's weights, not those of the hub that it once began with
    data = ModelCard(model_card("n", settings(config=lora | {"model": "runs/a"}), 2, RECORDS, True)).data
    assert data.base_model is None
    data = ModelCard(model_card("n", settings(config={"model": "runs/a"}), 2, RECORDS, False)).data
    assert data.base_model == "meta-llama/Llama-3.2-1B"


def test_the_text():
    text = model_card("org/name", settings(), 2, RECORDS, False)
    assert "\n# org/name\n" in text and "Token-aware ([arXiv 2502.11541](https://arxiv.org/abs/2502.11541))." in text
    # Of the exported step, not of the run's last one; nothing of the machine's speed
    assert "| metric | training, step 2 | held-out data, step 2 |" in text
    assert "| loss | 0.5000 | 0.4500 |" in text and "| rewards/margins | 0.2500 |  |" in text
    assert "0.125" not in text and "tokens\\_per\\_second" not in text
    assert "```sh\npython -m launch.musc_train --config.seed=1\n```" in text
    assert "\noptim.learning_rate = 5e-06\n" in text and "Versions: python 3.11.7, jax 0.10.2." in text
    assert "| devices | 8 x TPU v5e |" in text and "| data | org/pairs:train |" in text


def test_a_run_of_before_there_were_cards():
    old = {"command": "musc_train", "config": settings()["config"]}
    text = model_card("name", old, 2, RECORDS, False)
    assert ModelCard(text).data.base_model is None and "| loss | 0.5000 | 0.4500 |" in text


EVIL = "a|b <script>x</script> `c` [d](e)\n---\nlicense: mit\n```\n# f"


def test_nothing_breaks_out_of_its_place():
    text = model_card("n", settings(config={"model": EVIL, "input": EVIL}), 2, RECORDS, False)
    assert ModelCard(text).data.license == "llama3.2"
    row = next(line for line in text.splitlines() if line.startswith("| data |"))
    assert "<script>" not in row and row.replace(r"\|", "").count("|") == 3 and r"\[d\](e) --- license" in row
    made = settings()["made_with"] | {"command_line": "x ```\n# y"}
    assert "````sh\nx ```\n# y\n````" in model_card("n", settings(made_with=made), 2, RECORDS, False)


# --- what a run records ----------------------------------------------------------------------------------------------


def test_the_command_line(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/home/me/lm/launch/musc_train.py", "--config.input=a b", "--u=https://me:pw@h/x"]
    )
    made = made_with()
    assert made["command_line"] == "python -m launch.musc_train '--config.input=a b' --u=https://h/x"
    assert made["versions"].keys() >= {"python", "jax", "transformers"}
    assert json.loads(json.dumps(made)) == made and made["devices"].endswith("x cpu")


def test_the_origin(tmp_path):
    (tmp_path / "model").mkdir()
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    local = origin(str(tmp_path / "model"), str(tmp_path / "model"), str(rows), None)
    assert local == {"base_model": None, "license": {}, "datasets": []}
    (tmp_path / "model/README.md").write_text("---\nlicense: other\nlicense_name: mine\ntags: [x]\n---\ntext")
    known = origin("org/model", str(tmp_path / "model"), "org/data:train", None)
    assert known == {
        "base_model": "org/model",
        "license": {"license": "other", "license_name": "mine"},
        "datasets": ["org/data"],
    }
    # A run of that run, on other data
    later = origin(str(tmp_path), str(tmp_path / "model"), "org/more", known)
    assert later == known | {"datasets": ["org/data", "org/more"]}
    (tmp_path / "model/README.md").write_text("---\nlicense: [\n---\n")
    assert origin("org/model", str(tmp_path / "model"), str(rows), None)["license"] == {}


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def api(monkeypatch):
    """(Calls of the hub's API with the token that they were made with; what the upload raises; what it calls)."""
    calls, fails, looks = [], [], []

    def record(name):
        def call(self, *args, **kwargs):
            calls.append((name, self.token, args, kwargs))
            for look in looks if name == "upload_folder" else ():
                look()
            if fails and name == "upload_folder":
                raise fails[0]

        return call

    monkeypatch.setattr(HfApi, "create_repo", record("create_repo"))
    monkeypatch.setattr(HfApi, "upload_folder", record("upload_folder"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return calls, fails, looks


def test_push(api, tmp_path):
    push(str(tmp_path), "org/name", private=True)
    (create, *_), (upload, *_) = calls = api[0]
    assert [create, upload] == ["create_repo", "upload_folder"] and {c[1] for c in calls} == {"hf_secret"}
    assert calls[0][2:] == (("org/name",), {"private": True, "exist_ok": True})
    assert calls[1][3]["repo_id"] == "org/name" and calls[1][3]["folder_path"] == str(tmp_path)


def test_what_the_hub_refuses_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with Server(lambda asked: Reply(status=403)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url.removesuffix("/v1"))
        with pytest.raises(UserError, match=r"is whole, .*403.*then: hf upload org/name /.* --private$") as raised:
            push(str(tmp_path), "org/name", private=True)
    assert "hf_secret" not in str(raised.value)
    (asked,) = server.asked
    assert asked.path.endswith("/api/repos/create") and asked.body["name"] == "name"
    assert "private" in json.dumps(asked.body)  # `private` or `visibility`, by the client's version
    assert asked.headers["authorization"] == "Bearer hf_secret"


def test_an_upload_that_breaks_off_is_said(api, tmp_path):
    api[1].append(OSError("no route"))
    with pytest.raises(UserError, match=r"is whole, .*no route.*then: hf upload org/name /[^ ]*$"):
        push(str(tmp_path), "org/name", private=False)


def test_a_hub_that_is_not_there_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="is whole, but it could not be uploaded to org/name"):
        push(str(tmp_path), "org/name", private=True)


def exporting(tmp_path, **changes):
    if not (tmp_path / "model").exists():
        make_checkpoint(tmp_path / "model", "llama")
    values = runpy.run_path("configs/export_hf.py")["get_config"]().to_dict()
    values |= {"model": str(tmp_path / "model"), "output": str(tmp_path / "out"), "push_to_hub": "org/name", **changes}
    return from_config_dict(ExportConfig, values)


def test_what_is_uploaded_is_whole(api, tmp_path, monkeypatch, repo_root):
    monkeypatch.chdir(repo_root)
    held = []
    api[2].append(lambda: held.extend(p.name for p in (tmp_path / "out").iterdir()))
    export(exporting(tmp_path, private=False))
    assert {"config.json", "model.safetensors"} <= set(held)
    assert [(c[0], c[3].get("private")) for c in api[0]] == [("create_repo", False), ("upload_folder", None)]


def test_nothing_is_uploaded_of_an_export_that_failed(api, tmp_path, monkeypatch, repo_root):
    monkeypatch.chdir(repo_root)

    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(hf_io, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        export(exporting(tmp_path))
    assert api[0] == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["name", "a/b/c", "org/..", "org/na me", "https://huggingface.co/org/name"])
def test_names(name, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "t")
    with pytest.raises(UserError, match="config.push_to_hub=.*give org/name"):
        check_push(name)


def test_a_token_is_wanted_from_the_environment(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError, match="has no HF_TOKEN"):
        check_push("org/name")
