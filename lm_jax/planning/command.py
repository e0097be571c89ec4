"""`launch.plan`: what a command's compiled programs take of a TPU pod's chips, or of the devices that are here."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from lm_jax.config import ModelConfig, from_config_dict, to_dict
from lm_jax.console import say
from lm_jax.data.rows import write_text
from lm_jax.errors import UserError
from lm_jax.models.registry import weight_table
from lm_jax.planning.compiled import Cost, compile_program
from lm_jax.planning.programs import Program, decode_programs, score_program
from lm_jax.planning.published import model_shape
from lm_jax.planning.search import Candidate, estimated_seconds, search
from lm_jax.planning.topologies import Target, open_target
from lm_jax.sharding import make_mesh
from lm_jax.strict_json import dumps
from lm_jax.training.trainer import TrainConfig

# (config of a command, model, mesh) -> what the command compiles, its main program first
Programs = Callable[[Any, ModelConfig, jax.sharding.Mesh], list[Program]]


def read_config(values: Mapping[str, Any], commands: Mapping[type, Programs]) -> Any:
    """The config of the one command that has the keys of `values`; where data lie may be unset.

    Raises:
      UserError: keys of none of them, a value of the wrong type, a model that is not given.
    """
    names = {cls: {f.name for f in dataclasses.fields(cls)} for cls in commands}
    cls = next((cls for cls in commands if names[cls] == set(values)), None)
    if cls is None:
        raise UserError(
            "--config: not the keys of a command that can be planned; give configs/musc_train.py, "
            "configs/main_train.py, configs/score.py or configs/generate.py"
        )
    if values["model"] is None:
        raise UserError("config.model: not set; give --config.model=VALUE, a directory with config.json")
    unset = {name: "" for name in ("input", "output") if values[name] is None}
    return from_config_dict(cls, {**values, **unset})


def score_programs(config, model: ModelConfig, mesh: jax.sharding.Mesh) -> list[Program]:
    """Of `launch.score`."""
    return [score_program(config.batch, config.compute, config.max_length, model, mesh)]


def generate_programs(config, model: ModelConfig, mesh: jax.sharding.Mesh) -> list[Program]:
    """Of `launch.generate`, the decode step first."""
    prefill, decode = decode_programs(config.decode, config.compute, config.sampling, config.dtype, model, mesh)
    return [decode, prefill]


def plan(config: Any, programs: Programs, topology: str | None, output: str | None, searching: bool) -> None:
    """Compiles what the command of `config` would, prints a table and writes `output` (JSON).

    Args:
      topology: as `v5e:8x8`; None: the devices that are here.
      searching: try other meshes, rows at a time and remat policies too, and print those that fit.

    Raises:
      UserError: anything the user can mend.
    """
    if output is not None and epath.Path(output).is_dir():
        raise UserError(f"--output={output}: is a directory; give a file name")
    if searching and not isinstance(config, TrainConfig):
        raise UserError("--search: for a config that trains; leave it out")
    target = open_target(topology)
    model = model_shape(config.model)

    def lowered(settings) -> list[Program]:
        return programs(settings, model, make_mesh(settings.mesh, list(target.devices)))

    costs = [compile_program(program, target) for program in lowered(config)]
    report = _report(config, model, target, costs)
    print(_table(report))
    if searching:
        say("searching; a candidate takes about as long as the training step just did")
        found = search(
            config,
            target,
            lambda settings: lowered(settings)[0],
            lambda program: compile_program(program, target),
            lambda candidate: say(_line(_candidate(candidate))),
        )
        report["search"] = [_candidate(c) for c in found]
        print("\nfitting, by the estimate for a token:")
        print("\n".join(_line(c) for c in report["search"] if c["fits"]) or "none")
    if output is not None and jax.process_index() == 0:
        write_text(output, dumps(report, indent=2) + "\n")


def _report(config: Any, model: ModelConfig, target: Target, costs: Sequence[Cost]) -> dict[str, Any]:
    main, mesh = costs[0], make_mesh(config.mesh, list(target.devices))
    limits = [cost.hbm_limit for cost in costs if cost.hbm_limit is not None]
    fits = [cost.fits for cost in costs]
    seconds = estimated_seconds(main, target)
    return {
        "topology": target.name,
        "chips": len(target.devices),
        "chip": target.devices[0].device_kind,
        "model": config.model,
        "parameters": sum(math.prod(spec.shape(model)) for spec in weight_table(model)),
        "mesh": dict(mesh.shape),
        "settings": {k: v for k, v in to_dict(config).items() if k in ("batch", "compute", "decode", "lora", "dtype")},
        "hbm_bytes_per_chip": max(cost.hbm for cost in costs),
        "hbm_limit_bytes": min(limits, default=None),
        "fits": False if False in fits else None if None in fits else True,
        "model_flops": main.program.model_flops,
        "recompute_factor": main.program.recompute_factor,
        "collectives": main.by_kind(),
        "seconds_per_token_estimate": seconds,
        "compile_seconds": round(sum(cost.compile_seconds for cost in costs), 1),
        "programs": {cost.program.name: cost.to_json() for cost in costs},
    }


def _table(report: Mapping[str, Any]) -> str:
    mesh = " ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    lines = [
        f"{report['model']} ({report['parameters'] / 1e9:.4g}B parameters) on {report['topology']}: "
        f"{report['chips']} x {report['chip']}, mesh {mesh}",
        "",
        f"{'program':10}{'HBM a chip':>12}{'arguments':>12}{'temporary':>12}{'of':>10}  {'fits':6}{'model FLOPs':>12}"
        f"{'recompute':>11}{'compiled in':>13}",
    ]
    for name, p in report["programs"].items():
        factor = "" if p["recompute_factor"] is None else f"{p['recompute_factor']:.2f}"
        lines.append(
            f"{name:10}{_bytes(p['hbm_bytes_per_chip']):>12}{_bytes(p['argument_bytes']):>12}"
            f"{_bytes(p['temporary_bytes']):>12}{_bytes(p['hbm_limit_bytes']):>10}  {_yes(p['fits']):6}"
            f"{p['model_flops']:>12.3g}{factor:>11}{p['compile_seconds']:>11.0f} s"
        )
    for name, p in report["programs"].items():
        for kind, c in p["collectives"].items():
            lines.append(
                f"{name}: {c['count']} x {kind}, arrays of {_bytes(c['bytes'])}, a chip sends {_bytes(c['wire_bytes'])}"
            )
    return "\n".join(lines)


def _candidate(candidate: Candidate) -> dict[str, Any]:
    config = candidate.config
    mesh = dataclasses.asdict(config.mesh)
    return {
        "fits": candidate.fits,
        "hbm_bytes_per_chip": candidate.cost.hbm,
        "mesh": mesh,
        "batch": {"rows_per_device": config.batch.rows_per_device},
        "remat": config.compute.remat,
        "recompute_factor": candidate.cost.program.recompute_factor,
        "wire_bytes": candidate.cost.wire_bytes,
        "seconds_per_token_estimate": candidate.seconds,
    }


def _line(found: Mapping[str, Any]) -> str:
    mesh = " ".join(f"--config.mesh.{axis}={size}" for axis, size in found["mesh"].items())
    batch = " ".join(f"--config.batch.{key}={value}" for key, value in found["batch"].items())
    seconds = found["seconds_per_token_estimate"]
    speed = "" if seconds is None else f", {seconds * 1e9:.3g} ns a token"
    return (
        f"{_yes(found['fits']):4} {_bytes(found['hbm_bytes_per_chip']):>10}{speed}: {mesh} {batch} "
        f"--config.compute.remat={found['remat']}"
    )


def _bytes(size: int | None) -> str:
    if size is None:
        return ""
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"


def _yes(fits: bool | None) -> str:
    return {True: "yes", False: "no", None: "?"}[fits]
