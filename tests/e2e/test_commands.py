"""`launch.score` on what people have, and --help."""

import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import transformers

from tests.conftest import ROOT
from tests.e2e import common
from tests.e2e.common import SMALL_SCORE, Fork, arguments, fork, run

LAUNCHERS = sorted(p.stem for p in (ROOT / "configs").glob("*.py"))
# Commands that name no file: what makes them end with an error after their flags were read
NEEDS_NO_FILES = {
    name: (f"--config.{key}=0", "must be at least 1")
    for name, key in (("lab_seed", "rows"), ("lab_ablation", "dev"), ("bench", "layers"))
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return common.make_model(tmp_path_factory.mktemp("model"))


def flags(model: str, rows: list[dict], output: Path, *settings: str) -> list[str]:
    path = common.write_rows(output.parent / "rows.jsonl", rows)
    return arguments("score", f"model={model}", f"input={path}", f"output={output}", *SMALL_SCORE, *settings)


def test_score_formats(model, tmp_path):
    """Strings and messages; the order, every other column, and what each added column means."""
    chat = [{"role": "user", "content": "what is this"}]
    rows = [
        {"id": 7, "prompt": "the cat", "response": " and the hat", "tags": ["a", {"b": None}], "ünï": "çode"},
        {"id": 5, "prompt": chat, "response": "that"},
        {"id": 9, "prompt": chat, "response": [{"role": "assistant", "content": "that"}]},
        *({"id": i, "prompt": "say " * (i % 3), "response": f"{i} " * (1 + i % 5)} for i in range(1, 20) if i % 3),
    ]
    done = run("score", *flags(model, rows, tmp_path / "scored.jsonl")).ok()
    scored = common.read_rows(tmp_path / "scored.jsonl")
    assert '"truncated": 0' in done.stdout
    added = {"prompt_token_ids", "token_ids", "logprob", "num_tokens", "token_logprobs", "token_entropies"}
    assert [{k: v for k, v in row.items() if k not in added} for row in scored] == rows
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    for row in scored:
        assert added <= row.keys()
        assert row["num_tokens"] == len(row["token_ids"]) == len(row["token_logprobs"]) == len(row["token_entropies"])
        assert row["logprob"] == pytest.approx(sum(row["token_logprobs"]), abs=1e-4) and row["logprob"] < 0
        assert min(row["token_entropies"]) > 0
        assert row["token_ids"][-1] == tokenizer.eos_token_id
        text = tokenizer.decode(row["token_ids"][:-1])
        assert text == (row["response"] if isinstance(row["response"], str) else "that")
    assert tokenizer.decode(scored[0]["prompt_token_ids"]) == "the cat"
    template = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(scored[1]["prompt_token_ids"]) == template
    assert scored[1]["token_logprobs"] == scored[2]["token_logprobs"]


@pytest.mark.slow
def test_a_score_depends_on_its_row_alone(model, tmp_path):
    """Not on its neighbours in a packed row, nor on the shape of a batch."""
    rows = [{"prompt": f"say {i}", "response": "yes " * i} for i in range(1, 9)]
    fork("score", *flags(model, rows, tmp_path / "together.jsonl", "batch.row_length=256")).ok()
    fork("score", *flags(model, rows, tmp_path / "alone.jsonl", "batch.row_length=64", "batch.rows=3")).ok()
    together, alone = (common.read_rows(tmp_path / f"{n}.jsonl") for n in ("together", "alone"))
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a["token_logprobs"], b["token_logprobs"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(a["token_entropies"], b["token_entropies"], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_several_responses_of_a_row_are_scored_each_as_alone(model, tmp_path):
    texts = [" and the hat", " sat", " and the hat"]
    # As launch.generate writes them: several samples, one of them empty, and a row without an answer
    unanswered = {"prompt": "the cat", "response": None, "finish_reason": "error"}
    some = {"prompt": "the cat", "response": ["", " sat"], "finish_reason": ["stop", "length"]}
    rows = [{"prompt": "the cat", "response": texts}, *({"prompt": "the cat", "response": text} for text in texts)]
    done = run("score", *flags(model, [*rows, unanswered, some], tmp_path / "scored.jsonl")).ok()
    assert '"without_response": 2' in done.stdout
    together, *alone, nothing, half = common.read_rows(tmp_path / "scored.jsonl")
    assert nothing["logprob"] is nothing["token_ids"] is None
    assert half["logprob"] == [None, pytest.approx(alone[1]["logprob"], abs=1e-5)]
    assert together["prompt_token_ids"] == alone[0]["prompt_token_ids"]
    for name in ("token_ids", "num_tokens"):
        assert together[name] == [row[name] for row in alone]
    np.testing.assert_allclose(together["logprob"], [row["logprob"] for row in alone], atol=1e-5)
    for name in ("token_logprobs", "token_entropies"):
        for a, row in zip(together[name], alone, strict=True):
            np.testing.assert_allclose(a, row[name], atol=1e-5)


def test_long_rows_are_cut_and_counted(model, tmp_path):
    rows = [{"prompt": "say", "response": "yes"}, {"prompt": "say", "response": "0123456789 " * 30}]
    done = fork("score", *flags(model, rows, tmp_path / "scored.jsonl")).ok()
    short, long = common.read_rows(tmp_path / "scored.jsonl")
    assert '"truncated": 1' in done.stdout and '"rows": 2' in done.stdout
    assert len(long["prompt_token_ids"]) + long["num_tokens"] == 64
    assert short["token_ids"][-1] != long["token_ids"][-1]  # the end token went with the tail


def test_the_output_appears_whole_or_not_at_all(model, tmp_path):
    """An error in the last row leaves the old file as it was, and so does a kill while the rows are scored."""
    output = tmp_path / "scored.jsonl"
    output.write_text("old\n")
    rows = [{"prompt": "say", "response": "yes"}] * 3
    line = fork("score", *flags(model, [*rows, {"prompt": "say", "response": ""}], output)).error()
    assert "rows.jsonl row 3" in line and "drop the row" in line
    assert output.read_text() == "old\n"
    assert {p.name for p in tmp_path.iterdir()} == {"rows.jsonl", "scored.jsonl"}
    scoring = Fork("score", *flags(model, rows * 1000, output))
    while not list(tmp_path.glob(".scored.jsonl.*")):  # until the new file is being written
        assert scoring.process.is_alive(), scoring.wait().stderr
        time.sleep(0.0005)
    scoring.process.kill()
    assert scoring.wait().status == -signal.SIGKILL
    assert output.read_text() == "old\n"
    fork("score", *flags(model, rows, output)).ok()
    assert len(common.read_rows(output)) == 3


@pytest.mark.parametrize("name", sorted({p.stem for p in (ROOT / "launch").glob("*.py")} - {"__init__", "cli"}))
def test_help(name):
    """At once, without JAX, so no accelerator is touched; it shows the command to copy."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"launch.{name}", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of the processor, not by the clock: what else runs on the machine does not count
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert f"python -m launch.{name}" in done.stdout
    assert name not in LAUNCHERS or f"python -m launch.{name} --config=configs/" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "runpy" in imported  # the list is one
    assert not imported & {"jax", "jaxlib", "flax", "transformers", "matplotlib", "datasets", "torch"}


@pytest.mark.parametrize(
    "raised", ["MemoryError()", "RuntimeError('RESOURCE_EXHAUSTED: Out of memory: 9 GiB\\nand more')"]
)
def test_out_of_memory_is_one_line_with_a_cure(raised):
    """As JAX says it; what else is raised keeps its traceback."""
    source = f"from launch import cli\ndef main(config): raise {raised}\ncli.run(lambda: (lambda values: values, main))"
    command = [sys.executable, "-c", source]
    done = subprocess.run([*command, "--config=configs/score.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert (
        last.startswith("error: out of memory")
        and "config.batch.rows_per_device" in last
        and "docs/troubleshooting" in last
    )
    other = [word.replace(raised, "KeyError('x')") for word in command]
    done = subprocess.run([*other, "--config=configs/score.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_commands_in_a_config_parse(name):
    """A docstring's command is the first thing that a newcomer copies."""
    text = (ROOT / "configs" / f"{name}.py").read_text().split('"""')[1]
    commands = re.findall(rf"python -m launch\.{name} --config=configs/{name}\.py(\S*)((?:.|\n(?!\n))*)", text)
    assert commands
    for preset, rest in commands:
        settings = re.findall(r"--config\.\S+", rest)
        assert settings
        # The files that it names are not here, so it ends with an error: about them, not about its flags
        *spoilt, message = NEEDS_NO_FILES.get(name, ("no such",))
        assert message in fork(name, f"--config=configs/{name}.py{preset}", *settings, *spoilt).error()
