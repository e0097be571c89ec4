"""`launch.musc_pairs` as users start it: on real instructions behind a server, killed in every stage, and refused."""

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from musc_jax.pairs.demonstrations import with_input
from musc_jax.pairs.methods import PLANS
from tests.e2e import common
from tests.e2e.common import Done, Fork, arguments, fork
from tests.http_server import Server
from tests.strong_model import careless, core, failed, manners, script
from tests.unit.test_baselines import assert_valid as assert_valid_baseline
from tests.unit.test_pairs import MIXED, ORDER, assert_valid, content, counts_of, instructions

MIX = [f"perturb.{name}={share}" for name, share in MIXED.items()]
# method -> its stages for a user's instructions
STAGES = {"musc": ORDER, **{name: PLANS[name].stages[1:] for name in PLANS if name != "musc"}}


def names(line: str, *parts: str) -> None:
    """The line names all of these."""
    assert [] == [part for part in parts if part not in line], line


def run(directory: Path, *settings: object, rows=None) -> Done:
    path = common.write_rows(directory / "in.jsonl", instructions() if rows is None else rows)
    return fork("musc_pairs", *arguments("musc_pairs", f"input={path}", f"output={directory}/out.jsonl", *settings))


# --- refused before anything is asked or written ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return common.make_model(tmp_path_factory.mktemp("model"), max_position_embeddings=8192)


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("temprature=1", ["config.temprature", "unknown key"]),
        ("respond.temprature=1", ["config.respond.temprature", "unknown key"]),
        ("perturb.seed=1", ["config.perturb.seed", "unknown key"]),
        ("perturb.drop=0.5", ["config.perturb", "sum to 0.5"]),
        ("respond.max_new_tokens=0", ["config.respond.max_new_tokens=0", "at least 1"]),
        ("num_instructions=4", ["config.input", "config.num_instructions", "give one"]),
        ("examples=no.jsonl", ["no.jsonl", "check the path"]),
        ("num_examples=11", ["config.num_examples", "11"]),
        ("endpoint.url=http://localhost:1/v1", ["config.model", "config.endpoint.url", "leave one"]),
        ("output=gs://bucket/out.jsonl", ["gs://bucket/out.jsonl", "local path"]),
        ("model=nowhere", ["nowhere", "no such directory"]),
        ("mesh.data=3", ["config.mesh"]),
        ("dtype=int8", ["config.dtype", "int8"]),
    ],
)
def test_settings(model, tmp_path, setting, parts):
    names(run(tmp_path, f"model={model}", setting).error(), *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_what_is_not_set(tmp_path):
    names(fork("musc_pairs", *arguments("musc_pairs", "model=x", f"output={tmp_path}/o.jsonl")).error(), "config.input")
    names(
        fork("musc_pairs", *arguments("musc_pairs", "model=x", "num_instructions=3")).error(),
        "config.output",
        "not set",
    )
    line = fork("musc_pairs", *arguments("musc_pairs", "num_instructions=3", f"output={tmp_path}/o.jsonl")).error()
    names(line, "config.model", "config.endpoint.url")


def test_a_model_without_a_chat_template(model, tmp_path):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "chat_template.jinja").unlink()
    names(run(tmp_path, f"model={bare}", "format=messages").error(), "config.format", "no chat template", "text")


# --- the built-in sampler --------------------------------------------------------------------------------------------

TINY = ("num_examples=1", "decompose.max_new_tokens=8", "decode.slots=2", "decode.max_length=2048", "decode.chunk=4")


@pytest.fixture
def tiny(model, tmp_path) -> tuple[str, ...]:
    """Settings for that model with an example as short as can be: its tokenizer knows little but bytes."""
    example = {"instruction": "Say it.", "constraints": ["Is it said?", "Is it good?"]}
    return f"model={model}", f"examples={common.write_rows(tmp_path / 'examples.jsonl', [example])}", *TINY


ROWS = [{"prompt": f"Say {word}."} for word in "one two three four five six seven eight".split()]


@pytest.mark.slow
def test_the_built_in_sampler_on_noise(tiny, tmp_path):
    """A random model decomposes nothing: an honest end, and its answers, kept, are those of a run that was killed."""
    done = run(tmp_path, *tiny, rows=ROWS)
    names(done.error(), "no pair left: of 8 rows all were dropped", "(decompose)", "out.jsonl.dropped.jsonl")
    counts = counts_of(tmp_path / "out.jsonl")
    assert counts["pairs"] == 0 and "decompose answer 8/8" in done.stderr and "pairs" in done.stdout
    answers = (tmp_path / "out.jsonl.stages" / "decompose.jsonl").read_bytes()
    assert (
        not (tmp_path / "out.jsonl").exists()
        and len({row["response"] for row in map(json.loads, answers.splitlines())}) > 4
    )

    path = common.write_rows(tmp_path / "in.jsonl", ROWS)
    killed = tmp_path / "killed" / "out.jsonl"
    flags = arguments("musc_pairs", f"input={path}", f"output={killed}", *tiny)
    partial = killed.with_name("out.jsonl.stages") / "decompose.jsonl.partial"
    process = common.start("musc_pairs", *flags, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not _lines(partial):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    kept = _lines(partial)
    assert 0 < kept < 8
    done = fork("musc_pairs", *flags)
    names(done.error(), "no pair left")
    names(done.stderr, f"decompose: {8 - kept} of 8 answers")
    assert (killed.with_name("out.jsonl.stages") / "decompose.jsonl").read_bytes() == answers


def test_a_template_without_a_system_role(model, tiny, tmp_path):
    import shutil

    strict = tmp_path / "strict"
    shutil.copytree(model, strict)
    template = strict / "chat_template.jinja"
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    template.write_text(refuse + template.read_text())
    names(run(tmp_path, f"model={strict}", *tiny[1:], rows=ROWS[:2]).error(), "no pair left", "(decompose)")
    assert "no_answer" not in counts_of(tmp_path / "out.jsonl")["stages"][0]["reasons"]


# --- killed ----------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


class Runs:
    """The same command on the same rows with several outputs."""

    def __init__(self, directory: Path, method: str):
        self.directory, self.method = directory, method
        rows = instructions(40 if method == "musc" else 16)
        rows += [{"id": "blank", "prompt": ""}, {"id": "short", "prompt": "Sing it"}]
        self.rows = common.write_rows(directory / "in.jsonl", rows)

    def output(self, name: str) -> Path:
        return self.directory / name / "out.jsonl"

    def start(self, name: str) -> Fork:
        settings = (f"method={self.method}", "num_samples=3", "judge_samples=2", "verify=True", *MIX)
        flags = arguments("musc_pairs", f"input={self.rows}", f"output={self.output(name)}", *settings)
        return Fork("tests.e2e.scripted_pairs", *flags)

    def kill_when(self, name: str, reached: Callable[[], bool]) -> None:
        """Starts the run and sends it SIGKILL as soon as a state is `reached`."""
        run = self.start(name)
        while run.process.is_alive() and not reached():
            time.sleep(0.0005)
        run.process.kill()
        assert run.wait().status == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("method", STAGES)
def test_killed_in_every_stage(tmp_path, method):
    runs, order = Runs(tmp_path, method), STAGES[method]
    whole = runs.start("whole").wait().ok()
    counts = counts_of(runs.output("whole"))
    assert counts["pairs"] == 40 if method == "musc" else counts["pairs"] > 8
    names(whole.stderr, *(f"{stage} answer" for stage in order))
    stages = runs.output("killed").with_name("out.jsonl.stages")
    for stage in order:
        partial = stages / f"{stage}.jsonl.partial"
        runs.kill_when("killed", lambda partial=partial: _lines(partial) >= 4)
        # Dead in this stage: those before it are whole, those after it have not begun
        found = {path.name.split(".")[0] for path in stages.iterdir()}
        assert found == {*order[: order.index(stage) + 1]} and not (stages / f"{stage}.jsonl").exists()
        assert _lines(partial) >= 4
    runs.kill_when("killed", runs.output("killed").with_name("out.jsonl.counts.json").exists)
    last = runs.start("killed").wait().ok()
    assert last.stdout == whole.stdout
    for end in ("", ".counts.json", ".dropped.jsonl", *(f".stages/{stage}.jsonl" for stage in order)):
        assert (
            Path(f"{runs.output('killed')}{end}").read_bytes() == Path(f"{runs.output('whole')}{end}").read_bytes()
        ), end
    left = {path.name for path in runs.output("killed").parent.iterdir()}
    assert left == {f"out.jsonl{end}" for end in ("", ".run.json", ".counts.json", ".dropped.jsonl", ".stages")}
    assert "finished already" in runs.start("killed").wait().ok().stderr


# --- real instructions behind a server -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(shared_data) -> list[dict]:
    """716 instructions that people wrote."""

    def lines(name):
        return [json.loads(line) for line in (shared_data / name).read_text(encoding="utf-8").splitlines()]

    rows = [{"id": f"ifeval-{row['key']}", "prompt": row["prompt"]} for row in lines("ifeval_prompts.jsonl")]
    return rows + [
        {"id": row["id"], "instruction": row["instruction"], "input": row["instances"][0]["input"]}
        for row in lines("self_instruct_seed_tasks.jsonl")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("examples", ["infobench_noinput.json", "infobench_input.json"])
def test_real_instructions(real, shared_data, tmp_path, examples):
    """A strong model's answers: nearly every row becomes a pair, and what was perturbed is seen in it."""
    with Server(script()) as server:
        url = (f"endpoint.url={server.url}", "endpoint.model=strong", f"examples={shared_data}/{examples}")
        done = run(tmp_path, *url, *MIX, "verify=True", rows=real).ok()
    counts, pairs = counts_of(tmp_path / "out.jsonl"), common.read_rows(tmp_path / "out.jsonl")
    assert counts["input"] == len(real) == 716 and len(pairs) == counts["pairs"] > 690
    assert f"of {len(real)} rows" in done.stdout.splitlines()[-1]
    texts = {str(row["id"]): with_input(row.get("prompt") or row["instruction"], row.get("input")) for row in real}
    kinds = set()
    for pair in pairs:
        assert_valid(pair)
        assert pair["original_instruction"] == texts[pair["id"]]
        full, perturbed = content(pair["prompt"]), content(pair["perturbed_prompt"])
        assert pair["input"].strip() in full and pair["input"].strip() in perturbed
        for edit in pair["perturbations"]:
            kinds.add(edit["kind"])
            assert core(edit["old"]) in full
            if edit["new"] is not None:
                assert core(edit["new"]) in perturbed and core(edit["new"]) in content(pair["rejected"])
    assert kinds == {"kept", "dropped", "substituted", "negated"}


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in PLANS if name != "musc"])
def test_real_instructions_and_a_baseline(real, tmp_path, method):
    """Every fourth instruction, one answer in ten bad: rows with a better and a worse response, the rest counted."""
    rows, bad = real[::4], list(manners().values())

    def change(text, asked):
        draw = asked.body["seed"] % 100
        return bad[draw](text, asked) if draw < len(bad) else careless(text, asked)

    with Server(script(change)) as server:
        url = (f"endpoint.url={server.url}", "endpoint.model=strong", "max_failed_share=0.1")
        run(tmp_path, *url, f"method={method}", "judge_samples=1", rows=rows).ok()
    counts, pairs = counts_of(tmp_path / "out.jsonl"), common.read_rows(tmp_path / "out.jsonl")
    assert counts["input"] == len(rows) == 179 and len(pairs) == counts["pairs"] > 80
    assert bool(counts["left_out"]) == (method != "self_correct")
    texts = {str(row["id"]): with_input(row.get("prompt") or row["instruction"], row.get("input")) for row in rows}
    for pair in pairs:
        assert_valid_baseline(pair, method)
        assert pair["original_instruction"] == texts[pair["id"]]


@pytest.mark.slow
def test_real_instructions_and_malformed_answers(real, tmp_path):
    """One answer in five is bad, in one of ten manners."""
    changes = list(manners().values())

    def change(text, asked):
        draw = asked.body["seed"] % 50
        return changes[draw] if draw < len(changes) else lambda text, asked: text

    with Server(script(lambda text, asked: change(text, asked)(text, asked))) as server:
        url = (f"endpoint.url={server.url}", "endpoint.model=strong", "max_failed_share=0.1")
        run(tmp_path, *url, *MIX, "verify=True", rows=real).ok()
    counts, pairs = counts_of(tmp_path / "out.jsonl"), common.read_rows(tmp_path / "out.jsonl")
    assert counts["input"] == 716 and 100 < counts["pairs"] < 600
    found = {reason for stage in counts["stages"] for reason in stage["reasons"]}
    assert {"empty", "refusal", "unparsable", "truncated", "echo", "no_answer", "empty_response"} <= found
    for pair in pairs:
        assert_valid(pair)


def test_a_server_that_refuses_everything(tmp_path):
    with Server(script(lambda text, asked: failed("the prompt is odd"))) as server:
        line = run(tmp_path, f"endpoint.url={server.url}", "endpoint.model=m").error(noise=True)
        names(line, "rows could not be answered", "config.max_failed_share", "the prompt is odd", "decompose.jsonl")
        line = run(tmp_path, f"endpoint.url={server.url}", "endpoint.model=m", "max_failed_share=1").error(noise=True)
        names(line, "no pair left", "12 no_answer (decompose)")


def test_a_server_that_goes_away_and_comes_back(tmp_path):
    back = threading.Event()

    def change(text, asked):
        return text if asked.number < 20 or back.is_set() else failed()

    with Server(script(change)) as server:
        url = (f"endpoint.url={server.url}", "endpoint.model=m", "endpoint.concurrency=4")
        names(run(tmp_path, *url).error(noise=True), "rows could not be answered", "recombine.jsonl.partial stay")
        run(tmp_path, *url).error(noise=True)  # it takes some attempts
        back.set()
        run(tmp_path, *url).ok()
    assert counts_of(tmp_path / "out.jsonl")["pairs"] == 12


def test_tasks_of_the_models_own(tmp_path):
    with Server(script()) as server:
        url = (f"endpoint.url={server.url}", "endpoint.model=m")
        flags = arguments("musc_pairs", *url, "num_instructions=20", f"output={tmp_path}/out.jsonl")
        done = fork("musc_pairs", *flags).ok()
    assert "self_instruct answer 20/20" in done.stderr
    pairs = common.read_rows(tmp_path / "out.jsonl")
    assert len(pairs) == counts_of(tmp_path / "out.jsonl")["pairs"] > 12
    for pair in pairs:
        assert_valid(pair)


def test_raw_text_from_a_server(tmp_path):
    with Server(script()) as server:
        run(tmp_path, f"endpoint.url={server.url}", "endpoint.model=base", "format=text").ok()
        paths = {asked.path for asked in server.asked}
        stops = [asked.body["stop"] for asked in server.asked if asked.prompt.endswith("\n\nResponse:\n")]
    assert paths == {"/v1/completions"} and stops == [["\n###\n", "\nInstruction:"]] * 24
    for pair in common.read_rows(tmp_path / "out.jsonl"):
        assert pair["prompt"].startswith("Instruction:\nWrite letter") and pair["prompt"].endswith("\n\nResponse:\n")
        assert pair["chosen"] != pair["rejected"] and isinstance(pair["chosen"], str)
