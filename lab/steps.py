"""The methods' commands with settings for the lab's small models: what the quickstart and the ablation run.

A step whose output is there is not run again; one that was interrupted goes on, as every command does.
"""

from pathlib import Path
from typing import Any

from lab.commands import run_step
from lm_jax.data.rows import read_rows

Settings = dict[str, Any]  # key of the command's config, with dots -> value

TAG = "Answer as a helpful assistant does."  # MAIN tells seed rows by it, and is used with it
WEB_TAG = "Answer as a text found on the web does."  # of rows whose instruction a model wrote
_TAGS: Settings = {"prompts.seed_system": TAG, "prompts.synthetic_system": WEB_TAG}
_LENGTH = 192  # tokens of the longest prompt and response that is trained on
_SLOTS: Settings = {
    "decode.slots": 128,
    "decode.max_length": 480,
}  # a decomposition with an in-context example is longest
_COPIES: Settings = {"mesh.data": -1, "mesh.fsdp": 1, "mesh.tensor": 1}  # to sample from a model this small
# One row length: with a model this small a compilation takes longer than the padding that it would save
_STEPS: Settings = {
    "max_length": _LENGTH,
    "batch.rows_per_device": 2,
    "batch.row_lengths": 1,
    "checkpoints.every": 1000,
}
_TRAINED: Settings = _STEPS | {"batch.examples": 32}
_PAIRED: Settings = _STEPS | {"batch.pairs": 32}


def make_pairs(model: str, instructions: str, examples: str, output: str, settings: Settings | None = None) -> None:
    """`launch.musc_pairs`.

    Args:
      model: the seed model.
      instructions: rows with `prompt`.
      examples: decomposed instructions, for the in-context example.
      settings: further keys of its config.
    """
    given: Settings = {"model": model, "input": instructions, "output": output}
    _run("musc_pairs", "", given | _making(examples) | _COPIES | (settings or {}))


def _making(examples: str) -> Settings:
    given: Settings = {
        "examples": examples,
        "num_examples": 1,
        "near_duplicate": 0.0,
    }  # instructions of a world are alike
    given |= {f"{stage}.max_new_tokens": n for stage, n in (("decompose", 160), ("recombine", 96), ("respond", 64))}
    return given | _SLOTS


def weigh(model: str, pairs: str, output: str, rules: str = "calibrated_entropy") -> None:
    """`launch.musc_token_weights`."""
    _run(
        "musc_token_weights",
        ":tiny",
        {"model": model, "input": pairs, "output": output, "rules": rules, "max_length": _LENGTH},
    )


def prefer(model: str, pairs: str, output: str, learning_rate: float, settings: Settings | None = None) -> None:
    """`launch.musc_train`, two epochs unless `settings` says otherwise."""
    given: Settings = {
        "model": model,
        "input": pairs,
        "output": output,
        "optim.learning_rate": learning_rate,
        "epochs": 2,
    }
    _run("musc_train", ":tiny", given | _PAIRED | (settings or {}))


def tune(model: str, rows: str, output: str, learning_rate: float, settings: Settings | None = None) -> None:
    """`launch.main_train`, ten epochs unless `settings` says otherwise."""
    given: Settings = {
        "model": model,
        "input": rows,
        "output": output,
        "optim.learning_rate": learning_rate,
        "epochs": 10,
    }
    _run("main_train", ":tiny", given | _TRAINED | (settings or {}))


def export(run: str, output: str) -> None:
    """`launch.export_hf`, in fp32: bf16 would round small changes away."""
    _run("export_hf", "", {"model": run, "output": output, "dtype": "float32"})


def show_pairs(model: str, pairs: str, counts: str, output: str) -> None:
    """`launch.report`."""
    given: Settings = {"model": model, "input": pairs, "counts": counts, "output": output, "max_length": _LENGTH}
    _run("report", ":tiny", given)


def iterate(
    model: str, instructions: str, examples: str, output: str, learning_rate: float, settings: Settings | None = None
) -> None:
    """`launch.musc_rounds`, two epochs a round; the rounds share the instructions among them."""
    given: Settings = {"model": model, "input": instructions, "output": output, "weights.max_length": _LENGTH}
    given |= {f"pairs.{key}": value for key, value in _making(examples).items()}
    learnt = {"optim.learning_rate": learning_rate, "epochs": 2} | _PAIRED
    given |= {f"train.{key}": value for key, value in learnt.items()}
    _run("musc_rounds", ":tiny", given | (settings or {}))


def answer(
    model: str, asked: str, output: str, temperature: float, seed: int = 0, samples: int = 1
) -> list[dict[str, Any]]:
    """`launch.generate`; the rows of `asked` with `response`, a list of several samples."""
    given: Settings = {"model": model, "input": asked, "output": output, "temperature": temperature, "seed": seed}
    given |= {"num_samples": samples}
    _run("generate", "", given | {"max_new_tokens": 64} | _SLOTS | _COPIES)
    return read_rows(output)


def teach_each_other(
    model: str, seeds: str, unlabelled: str, output: str, learning_rate: float, settings: Settings | None = None
) -> None:
    """`launch.main_rounds` with three candidates a response, one of them learnt."""
    given: Settings = {"model": model, "seeds": seeds, "unlabelled": unlabelled, "output": output}
    given |= _TAGS | {"candidates": 3, "learnt_candidates": 1}
    learnt = _TRAINED | {"optim.learning_rate": learning_rate, "epochs": 10}
    given |= {f"{side}.{key}": value for side in ("forward", "reverse") for key, value in learnt.items()}
    sampled = _SLOTS | _COPIES
    given |= {f"{side}.{key}": value for side in ("instructions", "responses") for key, value in sampled.items()}
    given |= {"instructions.temperature": 0.8, "instructions.max_new_tokens": 96, "responses.max_new_tokens": 64}
    _run("main_rounds", ":tiny", given | (settings or {}))


def keep(forward: str, reverse: str, candidates: str, output: str, settings: Settings | None = None) -> None:
    """`launch.main_filter`; every candidate with its scores and `kept` is in `output`.candidates.jsonl."""
    given: Settings = {"forward": forward, "reverse": reverse, "input": candidates, "output": output}
    _run("main_filter", ":tiny", given | _TAGS | {"max_length": _LENGTH} | (settings or {}))


def _run(command: str, preset: str, settings: Settings) -> None:
    if _finished(command, Path(settings["output"])):
        return
    run_step(
        f"launch.{command}",
        f"--config=configs/{command}.py{preset}",
        *(f"--config.{key}={value}" for key, value in settings.items()),
    )


def _finished(command: str, output: Path) -> bool:
    """Outputs appear when they are whole, directories of runs and rounds when they begin: those look for themselves."""
    return output.exists() and command not in ("musc_train", "main_train", "main_rounds", "musc_rounds")
