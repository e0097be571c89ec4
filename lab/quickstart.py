"""`launch.quickstart`: both methods on an embedded world, through the commands that a real run uses."""

import dataclasses
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.commands import run_step
from lab.steps import (
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
from lab.worlds.answers import estimate, shares, truly_answers, verdicts
from lab.worlds.data import clean_pairs, instructions, prompts, unlabelled_responses
from lab.worlds.seed_data import PAIRED
from lab.worlds.verifiers import Verdict
from lab.worlds.world import World
from lab.worlds.worlds import WORLDS
from lm_jax.data.rows import read_rows, write_jsonl
from lm_jax.errors import UserError

Row = dict[str, Any]

_INSTRUCTIONS = 3072  # complex ones that MuSC makes pairs of
_PAIRS, _RESPONSES = 300, 600  # what MAIN is given
_HELD_OUT = 1024  # instructions of 3 and more constraints, in compositions that no model has seen
_TEMPERATURE = 0.5  # of the answers that are measured; MuSC's own
_PREFERENCE_RATE, _NLL_WEIGHT = 2e-4, 0.2  # without the latter one answer in eight is no longer well formed
_BASE = "clean"  # MAIN's: the stage of the seed model that has met up to two constraints
_TUNING_RATE, _EPOCHS = 1e-3, 6  # of MAIN's trainings


@dataclasses.dataclass(frozen=True)
class _Arm:
    """A model that is measured: how the table calls it, what it answered, and what that is worth."""

    name: str
    rows: Sequence[Row]
    verdicts: Sequence[Verdict]


def quickstart(directory: str, seed: int = 0) -> None:
    """Fits a seed model for a world of the lab, runs MuSC and a short MAIN, and shows what they changed.

    Every step prints the command it runs, so that a user can put their own model or data in its place.

    Args:
      directory: `seed/` below it, the seed model, and what was compiled are kept from an earlier call; all else is
        removed first.

    Raises:
      UserError: a command failed, its own error standing above; or the seed model is below its gate.
    """
    root, world, began = Path(directory), WORLDS["lists"], time.monotonic()
    _clear(root)
    _set_environment(root / "compiled")
    print(f"\n1. a seed model: a small one that half knows how to follow instructions, in {root}/seed", flush=True)
    try:
        fit = ("--config=configs/lab_seed.py", f"--config.output={root}/seed", f"--config.seed={seed}")
        run_step("launch.lab_seed", *fit)
    except UserError as error:
        raise UserError(f"{error}; to begin with a new seed model: rm -r {root}/seed") from None
    fitted = time.monotonic()
    _write_data(root / "data", world, seed)
    musc, musc_text = _musc(root, world)
    improved = time.monotonic()
    main, main_text = _main(root, world)
    ended = time.monotonic()
    seconds = {"seed model": fitted - began, "MuSC": improved - fitted, "MAIN": ended - improved}
    write_jsonl(f"{root}/report.json", [{"musc": musc, "main": main, "seconds": seconds}])
    print("\n" + "\n\n".join((musc_text, main_text)))
    parts = ", ".join(f"{part} {taken:.0f} s" for part, taken in seconds.items())
    print(f"\nall in {ended - began:.0f} s ({parts}). Where everything is:")
    for path, what in (
        ("seed/model", "the seed model; transformers loads it"),
        ("musc/trained", "the model after MuSC; transformers loads it"),
        ("musc/page.html", "200 of the pairs that it learnt from, tokens tinted by weight: open it in a browser"),
        ("musc/pairs.jsonl", "all of them, for launch.musc_train or TRL"),
        ("musc/run", "the training: metrics.jsonl, tensorboard/, plots/, checkpoints/"),
        ("main/kept.jsonl", "what MAIN's filter kept"),
        ("main/kept.jsonl.plots", "what it chose by"),
        ("main/run", "the last training, as above"),
        ("report.json", "these tables as numbers"),
    ):
        print(f"  {root}/{path}: {what}")


def _clear(root: Path) -> None:
    """What a run left that did not end may be half of an entry, which JAX would never write again."""
    kept = {"seed", "compiled"} if (root / "report.json").exists() else {"seed"}
    for path in root.iterdir() if root.exists() else ():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _set_environment(compiled: Path) -> None:
    """Of the steps, which are processes: many compile the same, and two devices keep two cores busy."""
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_NUM_CPU_DEVICES": "2"}
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR"):
        print(f"$ export {name}={os.environ[name]}", flush=True)


def _write_data(data: Path, world: World, seed: int) -> None:
    pairs = clean_pairs(world, seed, _PAIRS)
    seen = {row["messages"][0]["content"] for row in pairs}
    seen |= {given.text for given in instructions(world, seed, "unlabelled", _RESPONSES, PAIRED)}
    given = {
        "instructions": instructions(world, seed, "quickstart/musc", _INSTRUCTIONS),
        "held_out": instructions(world, seed, "quickstart/held_out", _HELD_OUT, held_out=True),
        "main_held_out": instructions(world, seed, "quickstart/main", _HELD_OUT, (3, 4), held_out=True, avoid=seen),
    }
    tag = {"main_held_out": [{"role": "system", "content": TAG}]}
    for name, made in given.items():
        rows = [row | {"prompt": tag.get(name, []) + row["prompt"]} for row in prompts(world, made, name)]
        write_jsonl(str(data / f"{name}.jsonl"), rows)
    write_jsonl(str(data / "pairs.jsonl"), pairs)
    write_jsonl(str(data / "responses.jsonl"), unlabelled_responses(world, seed, _RESPONSES))


def _musc(root: Path, world: World) -> tuple[Row, str]:
    """What it gained, as numbers and in words."""
    musc, model = root / "musc", f"{root}/seed/model"
    pairs, weighed, asked = f"{musc}/pairs.jsonl", f"{musc}/weighed.jsonl", f"{root}/data/held_out.jsonl"
    print("\n2. MuSC: the model makes preference pairs, weighs their tokens and learns from them", flush=True)
    make_pairs(model, f"{root}/data/instructions.jsonl", f"{root}/seed/data/examples.jsonl", pairs)
    weigh(model, pairs, weighed)
    prefer(model, weighed, f"{musc}/run", _PREFERENCE_RATE, {"loss.nll_weight": _NLL_WEIGHT})
    export(f"{musc}/run", f"{musc}/trained")
    show_pairs(model, weighed, f"{pairs}.counts.json", f"{musc}/page.html")
    before = _arm("before", world, answer(model, asked, f"{musc}/before.jsonl", _TEMPERATURE))
    after = _arm("after MuSC", world, answer(f"{musc}/trained", asked, f"{musc}/after.jsonl", _TEMPERATURE))
    title = f"MuSC: held-out instructions of 3 to 5 constraints, {_HELD_OUT} answers at temperature {_TEMPERATURE}"
    numbers, table = _compare(before, after)
    return numbers, "\n".join((title, table, *_examples(before, after)))


def _main(root: Path, world: World) -> tuple[Row, str]:
    """What the filter keeps and what is learnt from it, as numbers and in words."""
    main, data, base = root / "main", root / "data", f"{root}/seed/{_BASE}"
    print(f"\n3. MAIN, from {base}: models write instructions for plain responses; a filter keeps some", flush=True)
    epochs = {f"{side}.epochs": _EPOCHS for side in ("forward", "reverse")}
    pairs, responses = f"{data}/pairs.jsonl", f"{data}/responses.jsonl"
    teach_each_other(base, pairs, responses, f"{main}/rounds", _TUNING_RATE, {"rounds": 1} | epochs)
    first, last = f"{main}/rounds/round_0", f"{main}/rounds/round_1"
    keep(f"{last}/forward", f"{last}/reverse", f"{last}/candidates.jsonl", f"{main}/kept.jsonl")
    print(f"{main}/mixed.jsonl: the seed pairs and what was kept", flush=True)
    write_jsonl(f"{main}/mixed.jsonl", [*read_rows(f"{first}/forward.jsonl"), *read_rows(f"{main}/kept.jsonl")])
    tune(base, f"{main}/mixed.jsonl", f"{main}/run", _TUNING_RATE, {"epochs": _EPOCHS})
    asked = f"{data}/main_held_out.jsonl"
    before, after = (
        _arm(name, world, answer(model, asked, f"{main}/answers_{file}.jsonl", _TEMPERATURE))
        for name, file, model in (
            ("of seed pairs", "seed", f"{first}/forward"),
            ("of seed and kept pairs", "seed_and_kept", f"{main}/run"),
        )
    )
    numbers, table = _compare(before, after)
    truth, said = _truth(world, read_rows(f"{main}/kept.jsonl.candidates.jsonl"))
    title = f"Training: held-out instructions of 3 and 4 constraints, {_HELD_OUT} answers at temperature {_TEMPERATURE}"
    return numbers | {"truth": truth}, "\n".join((said, title, table))


def _arm(name: str, world: World, rows: Sequence[Row]) -> _Arm:
    return _Arm(name, rows, verdicts(world, rows))


def _compare(before: _Arm, after: _Arm) -> tuple[Row, str]:
    """Both arms and their paired difference."""
    lines, numbers = [f"  {'':<22}{'all met, %':>16}{'each constraint':>17}{'well formed':>13}"], {}
    for arm in (before, after):
        numbers[arm.name] = found = shares(arm.verdicts)
        share = estimate([verdict.all_met for verdict in arm.verdicts])
        lines.append(f"  {arm.name:<22}{share.percent():>16}{found['each']:>17.1%}{found['well_formed']:>13.1%}")
    pairs = zip(before.verdicts, after.verdicts, strict=True)
    gain = estimate([int(b.all_met) - int(a.all_met) for a, b in pairs])
    unclear = "  (0 lies within: nothing shown)" if abs(gain.mean) < gain.half_width else ""
    lines.append(f"  {'gain (paired, 95%)':<22}{gain.percent(signed=True):>16}{unclear}")
    return {"arms": numbers, "gain": dataclasses.asdict(gain)}, "\n".join(lines)


def _examples(before: _Arm, after: _Arm) -> list[str]:
    """Three instructions: the first ones that were answered wrongly before."""
    wrong = [i for i, verdict in enumerate(before.verdicts) if not verdict.all_met]
    lines = ["  the first three that were wrong before:"]
    for i in wrong[:3]:
        lines.append(f"  {before.rows[i]['prompt'][-1]['content']}")
        for arm in (before, after):
            met = "all met" if arm.verdicts[i].all_met else "not all"
            lines.append(f"    {arm.name:<11} {met}  {arm.rows[i]['response']!r}")
    return lines


def _truth(world: World, candidates: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], str]:
    """How true the instructions are that the reverse model wrote, all of them and those that the filter kept."""
    written = [row for row in candidates if row["instruction"]]
    true = [truly_answers(world, row["instruction"], row["response"]) for row in written]
    kept = [found for found, row in zip(true, written, strict=True) if row["kept"]]
    found = {"all": estimate(true), "kept": estimate(kept)}
    said = (
        f"MAIN: of {len(true)} written instructions the response truly answers {found['all'].percent()} %, "
        f"of the {len(kept)} that the filter kept {found['kept'].percent()} %"
    )
    return {name: share.mean for name, share in found.items()}, said
