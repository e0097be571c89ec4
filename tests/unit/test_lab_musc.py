"""MuSC on the lab's worlds through its own code: a model without faults loses no row and makes true pairs."""

import json
import re

import pytest

from configs.lab_seed import get_config as lab_seed_config
from configs.musc_pairs import get_config
from lab.seed import LabSeedConfig
from lab.worlds.compositions import COMPLEX
from lab.worlds.data import instructions, prompts
from lab.worlds.grammar import Constraint, questions, read_instruction, render
from lab.worlds.lists import LISTS
from lab.worlds.seed_data import decomposed
from lab.worlds.trips import TRIPS
from lab.worlds.verifiers import verify
from lab.worlds.world import draw
from lab.worlds.writer import write
from lm_jax.config import from_config_dict
from lm_jax.data.rows import write_jsonl
from lm_jax.errors import UserError
from lm_jax.generation.requests import Completion, Sample
from musc_jax.pairs.command import PairsConfig, make_pairs
from musc_jax.pairs.prompts import numbered


class Perfect:
    """Answers decompositions, recombinations and instructions of a world as they should be."""

    def __init__(self, world):
        self._world = world
        self._constraints = {
            kind.question.replace("{}", value): Constraint(kind.name, value)
            for kind in world.kinds
            for value in [v for v, _ in kind.values] or [*world.words, *world.halves, ""]
        }

    def generate(self, requests, sampling):
        yield [Completion(r.id, (Sample(self._answer(r), "stop", None),)) for r in requests]

    def _answer(self, request):
        text = request.prompt if isinstance(request.prompt, str) else request.prompt[-1]["content"]
        rng = draw(self._world, 0, request.id, 0)
        if text.startswith("Instruction:"):
            asked = questions(self._world, read_instruction(self._world, text.split("\n", 1)[1]))
            return f"Constraints:\n{numbered(asked)}\n\nInput:\nNone"
        if text.startswith("Input:"):
            task, *asked = re.findall(r"^\d+\. (.*)$", text, re.MULTILINE)
            group = next(g.name for g in self._world.groups if self._world.task_question.replace("{}", g.name) == task)
            return f"Instruction:\n{render(self._world, group, [self._constraints[text] for text in asked], rng)}"
        instruction = read_instruction(self._world, text)
        return write(self._world, instruction.group, instruction.constraints, rng)


@pytest.mark.parametrize("world", [LISTS, TRIPS], ids=lambda world: world.name)
def test_pairs_of_a_model_without_faults(world, tmp_path):
    given = instructions(world, 0, "musc", 200)
    examples = [decomposed(world, i) for i in instructions(world, 0, "examples", 10, COMPLEX)]
    write_jsonl(f"{tmp_path}/in.jsonl", prompts(world, given, "musc"))
    write_jsonl(f"{tmp_path}/examples.jsonl", examples)
    settings = get_config()
    settings.update({"input": f"{tmp_path}/in.jsonl", "examples": f"{tmp_path}/examples.jsonl"})
    settings.update({"output": f"{tmp_path}/out.jsonl", "num_examples": 1, "near_duplicate": 0.0})
    make_pairs(from_config_dict(PairsConfig, settings.to_dict()), Perfect(world))
    rows = [json.loads(line) for line in open(f"{tmp_path}/out.jsonl", encoding="utf-8")]
    by_id = {row["id"]: instruction for row, instruction in zip(prompts(world, given, "musc"), given, strict=True)}
    assert len(rows) > 195  # a pair can be identical by chance
    lost = 0
    for row in rows:
        instruction = by_id[row["id"]]
        assert tuple(row["constraints"]) == questions(world, instruction)
        chosen, rejected = (
            text if isinstance(text, str) else text[0]["content"] for text in (row["chosen"], row["rejected"])
        )
        assert verify(world, instruction, chosen).all_met
        lost += not verify(world, instruction, rejected).all_met
    assert lost / len(rows) > 0.8  # what was dropped is seldom met all the same


def test_settings_of_the_seed_command():
    config = lab_seed_config()
    config.output = "out"
    made = from_config_dict(LabSeedConfig, config.to_dict())
    assert made.gate == 0.9
    for key, value, message in (
        ("world", "moon", "config.world='moon': unknown world; choose lists or trips"),
        ("rows", 0, "config.rows=0: must be at least 1"),
        ("gate", 2.0, "config.gate=2.0: must lie between 0 and 1"),
    ):
        with pytest.raises(UserError, match=message):
            from_config_dict(LabSeedConfig, config.to_dict() | {key: value})
