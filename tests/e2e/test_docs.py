"""The sequences of README.md, docs/musc.md and docs/main.md as they stand there, on a tiny model at small sizes.

What is changed: names of files lie in the test's directory, settings of size are added. The model that makes pairs is
scripted, and the rounds are not run here (tests/e2e/test_main_rounds.py does): what they would leave is made.
"""

import re
import shlex
from pathlib import Path

import pytest

from tests.documents import commands, page_text
from tests.e2e import common
from tests.e2e.common import Done, fork

PATHS = ("model", "input", "output", "forward", "reverse")
SMALL = {
    "musc_token_weights": ("max_length=128", "batch.row_length=512", "batch.rows=2"),
    "musc_train": ("max_length=128", "max_steps=2", "compute.remat=none"),
    "main_filter": ("max_length=200", "batch.row_length=256", "batch.rows=2"),
    "main_train": ("max_length=200", "max_steps=2", "compute.remat=none"),
    "report": ("max_length=128",),
}
SCRIPTED = {"musc_pairs": "tests.e2e.scripted_pairs"}
THINGS = "tea rain bread chess wool salt".split()


class Shell:
    """Runs the lines of a document in a directory."""

    def __init__(self, directory: Path, **names: str):
        self.directory, self.names = directory, names  # $NAME or NAME -> what it stands for

    def path(self, text: str) -> str:
        text = re.sub(r"\$(\w+)|^(DIR)$", lambda match: self.names[match[1] or match[2]], text)
        return str(self.directory / text)  # an absolute one stays

    def run(self, block: str, skip: str = "") -> list[Done]:
        done = []
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            line = line.strip()
            if assigned := re.fullmatch(r"(\w+)=(\S+)", line):
                self.names.setdefault(assigned[1], self.path(assigned[2]))
            elif line.startswith("cat "):
                *sources, _, target = shlex.split(line)[1:]
                texts = [Path(self.path(source)).read_text() for source in sources]
                Path(self.path(target)).write_text("".join(texts))
            elif command := next(iter(commands(line)), None):
                if command.name != skip:
                    done.append(self.command(command))
        return done

    def command(self, command) -> Done:
        placed = []
        for flag in command.flags:
            key, equals, value = flag.partition("=")
            is_path = key.removeprefix("--config.") in PATHS
            placed.append(key + equals + (self.path(value) if is_path else value))
        small = [f"--config.{setting}" for setting in SMALL.get(command.name, ())]
        return fork(SCRIPTED.get(command.name, command.name), *placed, *small).ok()


def block(page: str, heading: str, number: int = 0) -> str:
    """The indented lines below a heading, of its `number`th block."""
    section = page_text(page).split(f"\n{heading}\n")[1].split("\n## ")[0]
    return re.findall(r"(?:^ {4,}\S.*\n)+", section, re.M)[number]


@pytest.mark.slow
def test_the_path_of_musc(tmp_path):
    shell = Shell(tmp_path, M=common.make_model(tmp_path / "M", max_position_embeddings=512))
    rows = [{"prompt": f"Write on {thing}. Use {i} lines. Name a tool. Rhyme."} for i, thing in enumerate(THINGS)]
    common.write_rows(tmp_path / "instructions.jsonl", rows)
    readme = block("README.md", "## MuSC: from a model and instructions to a better model")
    guide = [block("docs/musc.md", "## The steps", number) for number in range(3)]
    # One and the same sequence, which the README begins with the installation
    assert [c.flags for c in commands(readme)] == [c.flags for c in commands(guide[0])]
    pairs, weighed, trained, exported = shell.run(guide[0])
    assert "recombine" in pairs.stderr + pairs.stdout and '"same_prompts"' in weighed.stdout
    first = common.read_rows(tmp_path / "runs/musc/metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(0.6931, abs=0.01)  # bfloat16
    assert "truncated to config.max_length" in trained.stderr + trained.stdout
    assert (tmp_path / "runs/musc-hf/model.safetensors").exists()
    (shown,) = shell.run(guide[1])
    assert "tokens of prompt" in shown.stdout
    shell.run(guide[2])
    assert "<html" in (tmp_path / "page.html").read_text()
    (tuned,) = shell.run(block("docs/musc.md", "## Baselines, and again"))
    assert "plain cross-entropy" in tuned.stderr + tuned.stdout


@pytest.mark.slow
def test_the_path_of_main(tmp_path):
    model = common.make_model(tmp_path / "DIR", max_position_embeddings=512)
    shell = Shell(tmp_path, DIR=model)
    text = " ".join(["Rain is the water that falls to the ground from the clouds when they are cold."] * 4)
    common.write_rows(tmp_path / "documents.jsonl", [{"text": text}])
    readme = block("README.md", "## MAIN: from seed pairs and raw text to a tuned model")
    guide = block("docs/main.md", "## The steps")
    assert [c.flags for c in commands(readme)] == [c.flags for c in commands(guide)][:-1]  # the guide also exports
    # As launch.main_rounds leaves them
    last = tmp_path / "runs/rounds/round_2"
    for direction in ("forward", "reverse"):
        common.make_model(last / direction, max_position_embeddings=512)
    (tmp_path / "runs/rounds/round_0").mkdir()
    seeds = [[("system", "S"), ("user", f"say {i}"), ("assistant", f"{i} cats sat")] for i in range(4)]
    messages = [[{"role": role, "content": content} for role, content in turns] for turns in seeds]
    rows = [{"messages": turns, "weight": 1.0, "source": "seed"} for turns in messages]
    common.write_rows(tmp_path / "runs/rounds/round_0/forward.jsonl", rows)
    candidates = [{"id": f"r{i}", "response": f"{i} cats sat", "instruction": f"say {i} cats"} for i in range(6)]
    common.write_rows(last / "candidates.jsonl", candidates)
    prepared, filtered, trained, exported = shell.run(guide, skip="main_rounds")
    assert "kept 1 of 1 segments" in prepared.stdout
    assert len(common.read_rows(tmp_path / "kept.jsonl")) == 3
    assert "alpha" in common.read_rows(tmp_path / "runs/main/metrics.jsonl")[0]
    assert (tmp_path / "runs/main-hf/model.safetensors").exists()
