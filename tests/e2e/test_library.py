"""The library's face: the very code of docs/library.md and README.md, and what a notebook does twice."""

import re

import jax
import pytest
import transformers

import lm_jax
import musc_jax
from lm_jax.data.rows import write_jsonl
from musc_jax.pairs import command as pairs_command
from tests.conftest import ROOT
from tests.e2e import common

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMALL = {"max_length": 64}


def blocks(path: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return str(common.make_model(tmp_path_factory.mktemp("model") / "model", max_position_embeddings=512))


@pytest.fixture(scope="module")
def model(path):
    return lm_jax.load(path)


def scripted_pairs(config, generator=None):
    """A random model makes none."""
    assert config.respond.max_new_tokens == 256 and config.respond.temperature == 0.5
    row = {"prompt": "a cat", "chosen": "the cat sat", "rejected": "a hat", "perturbed_prompt": "a", "id": "0"}
    write_jsonl(config.output, [{**row, "id": str(i), "prompt": f"a cat {i}"} for i in range(4)])


def test_the_code_of_the_documents_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pairs_command, "make_pairs", scripted_pairs)
    names: dict = {}
    code = blocks("docs/library.md")
    assert len(code) >= 5 and HUB in code[0] and blocks("README.md") == code[:1]
    for block in code:
        exec(block.replace(HUB, path), names)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hello").config.model_type == "llama"
    assert len(names["weighed"]) == 4 and len(names["kept"]) == 2
    for run in ("hello", "focal", "musc", "exponential", "main"):
        assert "loss" in common.read_rows(tmp_path / "runs" / run / "metrics.jsonl")[0], run
    assert common.read_rows(tmp_path / "runs/exponential/metrics.jsonl")[0]["loss"] == pytest.approx(1.0)  # exp(0)
    assert "logprob" in common.read_rows(tmp_path / "runs/focal/metrics.jsonl")[0]


def test_a_new_loss_takes_at_most_15_lines():
    (custom,) = [block for block in blocks("docs/library.md") if "Objective" in block]
    assert len([line for line in custom.splitlines() if line.strip()]) <= 15


def test_called_twice_nothing_is_compiled_anew(path):
    prompts, rows = ["the cat", "what is this"], [{"prompt": "a", "response": "the cat sat"}]
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **kwargs: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    fresh = lm_jax.load(path, mesh={"fsdp": 1})
    for number in range(2):
        texts, scored = fresh.generate(prompts, max_new_tokens=5 + number, temperature=0), fresh.score(rows)
        assert (len(texts), len(scored)) == (2, 1) and bool(compiled) == (number == 0)
        compiled.clear()
    jax.monitoring.clear_event_listeners()


def test_samples_and_messages(model):
    talk = [{"role": "user", "content": "the cat"}]
    (texts,) = model.generate([talk], max_new_tokens=4, num_samples=3, seed=1)
    assert len(texts) == 3 and texts == model.generate([talk], max_new_tokens=4, num_samples=3, seed=1)[0]
    scored = model.score([{"prompt": talk, "response": "a hat"}])[0]
    assert scored["num_tokens"] == len(scored["token_logprobs"]) and scored["logprob"] < 0


def test_errors_name_what_is_wrong_and_end_nothing(model, tmp_path):
    with pytest.raises(lm_jax.UserError, match=r"rows row 1"):
        model.score([{"prompt": "a", "response": "b"}, {"prompt": "a", "response": ""}])
    with pytest.raises(lm_jax.UserError, match=r"config\.optim\.rate: unknown key"):
        lm_jax.train(model, [{"prompt": "a", "response": "b"}], output=f"{tmp_path}/run", optim={"rate": 1.0})
    with pytest.raises(lm_jax.UserError, match="nowhere"):
        lm_jax.load(f"{tmp_path}/nowhere")


def test_another_loss_does_not_go_on_with_a_run(model, tmp_path):
    """The run's settings do not hold the function; its name is told instead."""
    pairs = [{"prompt": f"say {i}", "chosen": "the cat", "rejected": "a hat"} for i in range(4)]
    call = {"output": f"{tmp_path}/run", "weights": "uniform", "epochs": 1} | SMALL

    def first(logratios, logprobs, lengths):
        return -logratios[:, 0]

    def second(logratios, logprobs, lengths):
        return logratios[:, 1]

    musc_jax.train(model, pairs, loss=first, **call)
    for other in (second, None):
        with pytest.raises(lm_jax.UserError, match=r"belongs to musc_jax.train with the loss .*first; give another"):
            musc_jax.train(model, pairs, loss=other, **call)


def test_rows_to_evaluate_on_and_older_checkpoints(model, tmp_path):
    rows = [{"prompt": f"say {i}", "response": "the cat"} for i in range(4)]
    held = write_jsonl(f"{tmp_path}/held.jsonl", rows[:2]) or f"{tmp_path}/held.jsonl"
    call = {"eval_input": held, "eval_every": 1, "batch": {"examples": 2}, "epochs": 1, "checkpoints": {"every": 1}}
    lm_jax.train(model, rows, output=f"{tmp_path}/run", **call, **SMALL)
    assert any("eval_loss" in row for row in common.read_rows(tmp_path / "run" / "metrics.jsonl"))
    older = lm_jax.load(tmp_path / "run", step=1)
    assert older.score(rows[:1])[0]["logprob"] < 0
    with pytest.raises(lm_jax.UserError, match="step 1 was loaded and step 2 is the newest"):
        lm_jax.train(older, rows, output=f"{tmp_path}/more", **SMALL)


def test_a_call_goes_on_where_the_last_ended(model, tmp_path):
    rows = [{"prompt": f"say {i}", "response": "the cat"} for i in range(4)]
    call = {"output": f"{tmp_path}/run", "batch": {"examples": 2}, "epochs": 2} | SMALL
    trained = lm_jax.train(model, rows, **call)
    before = common.read_rows(tmp_path / "run" / "metrics.jsonl")
    again = lm_jax.train(model, rows, **call)
    assert common.read_rows(tmp_path / "run" / "metrics.jsonl") == before and again.source.name == trained.source.name
    assert trained.generate(["a"], max_new_tokens=2, temperature=0) != [] and musc_jax.train is not lm_jax.train
