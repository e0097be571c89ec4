"""`launch.quickstart`: both methods on an embedded world, through the commands that a real run uses."""

import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_jax.commands.lab_steps import (
    TAG,
    answer,
    export,
    keep,
    make_pairs,
    prefer,
    show_pairs,
    teach_each_other,
    tune,
    weigh,
)
from lm_jax.commands.steps import run_step
from lm_jax.data.rows import read_rows, write_jsonl
from lm_jax.lab.answers import Estimate, estimate, truly_answers, verdicts
from lm_jax.lab.data import clean_pairs, instructions, prompts, unlabelled_responses
from lm_jax.lab.seed_data import PAIRED
from lm_jax.lab.verifiers import Verdict
from lm_jax.lab.world import World
from lm_jax.lab.worlds import WORLDS

Row = dict[str, Any]

_INSTRUCTIONS = 1536  # complex ones that MuSC makes pairs of
_HELD_OUT = 512  # that no model sees before it is measured: one standard error is about two points
_PAIRS, _RESPONSES = 500, 1200  # what MAIN is given
_TEMPERATURE = 0.5  # of the answers that are measured; MuSC's own
_RATE = 2e-3  # of MAIN's trainings, which begin at a model that has seen no pair


@dataclasses.dataclass(frozen=True)
class _Arm:
    """A model that is measured: how the table calls it, and what it answered."""

    name: str
    rows: Sequence[Row]


def quickstart(directory: str, seed: int = 0) -> None:
    """Fits a seed model for a world of the lab, runs MuSC and a short MAIN on it, and shows what changed.

    Every step prints the command it runs, so that a user can put their own model or data in its place.

    Args:
      directory: `seed/` below it, the seed model, is kept from an earlier call; the rest is made anew.

    Raises:
      UserError: a command failed, its own error standing above; or the seed model is below its gate.
    """
    root, world, began = Path(directory), WORLDS["lists"], time.monotonic()
    for name in ("data", "musc", "main"):
        shutil.rmtree(root / name, ignore_errors=True)
    print(f"1. a seed model: a small Llama that half knows how to follow instructions, in {root}/seed", flush=True)
    run_step("launch.lab_seed", "--config=configs/lab_seed.py", f"--config.output={root}/seed", f"--config.seed={seed}")
    _write_data(root / "data", world, seed)
    fitted = time.monotonic()
    musc = _musc(root, world)
    main = _main(root, world)
    print("\n" + "\n\n".join((musc, main)))
    print(f"\nthe seed model took {fitted - began:.0f} s, all {time.monotonic() - began:.0f} s. Where everything is:")
    for path, what in (
        ("seed/model", "the seed model; transformers loads it"),
        ("musc/trained", "the model after MuSC; transformers loads it"),
        ("musc/page.html", "the pairs that it learnt from, every token tinted by its weight: open it in a browser"),
        ("musc/pairs.jsonl", "the same pairs, for launch.musc_train or TRL"),
        ("musc/run, main/seed_and_kept_pairs_run", "runs: metrics.jsonl, tensorboard/, checkpoints/"),
        ("main/kept.jsonl", "what MAIN's filter kept; main/kept.jsonl.plots/ shows the scores"),
    ):
        print(f"  {root}/{path}: {what}")


def _write_data(data: Path, world: World, seed: int) -> None:
    given = {
        "instructions": instructions(world, seed, "quickstart/musc", _INSTRUCTIONS),
        "held_out": instructions(world, seed, "quickstart/held_out", _HELD_OUT, held_out=True),
        "main_held_out": instructions(world, seed, "quickstart/main", _HELD_OUT, PAIRED),
    }
    tag = {"main_held_out": [{"role": "system", "content": TAG}]}
    for name, made in given.items():
        rows = [row | {"prompt": tag.get(name, []) + row["prompt"]} for row in prompts(world, made, name)]
        write_jsonl(str(data / f"{name}.jsonl"), rows)
    write_jsonl(str(data / "pairs.jsonl"), clean_pairs(world, seed, _PAIRS))
    write_jsonl(str(data / "responses.jsonl"), unlabelled_responses(world, seed, _RESPONSES))


def _musc(root: Path, world: World) -> str:
    """What it gained."""
    musc, model = root / "musc", f"{root}/seed/model"
    pairs, weighed, asked = f"{musc}/pairs.jsonl", f"{musc}/weighed.jsonl", f"{root}/data/held_out.jsonl"
    print("\n2. MuSC: the model makes preference pairs, weighs their tokens and learns from them", flush=True)
    make_pairs(model, f"{root}/data/instructions.jsonl", f"{root}/seed/data/examples.jsonl", pairs)
    weigh(model, pairs, weighed)
    prefer(model, weighed, f"{musc}/run", learning_rate=1e-4)
    export(f"{musc}/run", f"{musc}/trained")
    show_pairs(model, weighed, f"{pairs}.counts.json", f"{musc}/page.html")
    before = _Arm("before", answer(model, asked, f"{musc}/before.jsonl", _TEMPERATURE))
    after = _Arm("after MuSC", answer(f"{musc}/trained", asked, f"{musc}/after.jsonl", _TEMPERATURE))
    title = f"MuSC: held-out instructions of 3 to 5 constraints, {_HELD_OUT} answers at temperature {_TEMPERATURE}"
    return "\n".join((title, _table(world, before, after), *_examples(world, before, after)))


def _main(root: Path, world: World) -> str:
    """What the filter keeps, and what is learnt from it."""
    main, data, base = root / "main", root / "data", f"{root}/seed/pretraining"
    print(
        "\n3. MAIN: forward and reverse models write instructions for plain responses; a filter keeps some", flush=True
    )
    rounds = {"rounds": 1}
    teach_each_other(base, f"{data}/pairs.jsonl", f"{data}/responses.jsonl", f"{main}/rounds", _RATE, rounds)
    last = f"{main}/rounds/round_1"
    keep(f"{last}/forward", f"{last}/reverse", f"{last}/candidates.jsonl", f"{main}/kept.jsonl")
    seeds = read_rows(f"{main}/rounds/round_0/forward.jsonl")
    sets = {"seed pairs": seeds, "seed and kept pairs": [*seeds, *read_rows(f"{main}/kept.jsonl")]}
    arms = []
    for name, rows in sets.items():
        stem = f"{main}/{name.replace(' ', '_')}"
        write_jsonl(f"{stem}.jsonl", rows)
        tune(base, f"{stem}.jsonl", f"{stem}_run", _RATE)
        arms.append(
            _Arm(name, answer(f"{stem}_run", f"{data}/main_held_out.jsonl", f"{stem}_answers.jsonl", _TEMPERATURE))
        )
    title = f"MAIN: held-out instructions of 1 to 4 constraints, {_HELD_OUT} answers at temperature {_TEMPERATURE}"
    return "\n".join((title, _table(world, *arms), _truth(world, read_rows(f"{main}/kept.jsonl.candidates.jsonl"))))


def _table(world: World, before: _Arm, after: _Arm) -> str:
    """Both arms and their paired difference."""
    made = [verdicts(world, arm.rows) for arm in (before, after)]
    lines = [f"  {'':<22}{'all met, %':>16}{'each constraint':>17}{'well formed':>13}"]
    for arm, found in zip((before, after), made, strict=True):
        each = estimate([met for verdict in found for met in verdict.met])
        well = estimate([verdict.well_formed for verdict in found])
        lines.append(f"  {arm.name:<22}{_all_met(found).percent():>16}{each.mean:>17.1%}{well.mean:>13.1%}")
    gain = estimate([int(b.all_met) - int(a.all_met) for a, b in zip(*made, strict=True)])
    lines.append(f"  {'gain (paired, 95%)':<22}{gain.percent(signed=True):>16}")
    return "\n".join(lines)


def _all_met(found: Sequence[Verdict]) -> Estimate:
    return estimate([verdict.all_met for verdict in found])


def _examples(world: World, before: _Arm, after: _Arm) -> list[str]:
    """Three instructions that were answered wrongly before, or the first ones."""
    wrong = [not verdict.all_met for verdict in verdicts(world, before.rows)]
    order = sorted(range(len(wrong)), key=lambda i: not wrong[i])[:3]
    lines = []
    for i in order:
        lines.append(f"  {before.rows[i]['prompt'][-1]['content']}")
        for arm in (before, after):
            met = verdicts(world, [arm.rows[i]])[0].all_met
            lines.append(f"    {arm.name:<11} {'all met' if met else 'not all'}  {arm.rows[i]['response']!r}")
    return lines


def _truth(world: World, candidates: Sequence[Mapping[str, Any]]) -> str:
    """How true the instructions are that the reverse model wrote, all of them and those that the filter kept."""
    true = [truly_answers(world, row["instruction"], row["response"]) for row in candidates]
    kept = [found for found, row in zip(true, candidates, strict=True) if row["kept"]]
    return (
        f"  candidates that their response truly answers: {estimate(true).percent()} % of all {len(true)}, "
        f"{estimate(kept).percent()} % of the {len(kept)} kept"
    )
