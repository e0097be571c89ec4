"""Other meshes, rows at a time and remat policies than a config's, those that fit ranked by an estimate of their speed.

A step that adds gradients over microbatches is the same step, so rows at a time cost nothing but memory. What holds for
one candidate settles others: where one row at a time does not fit, more of them do not either, and where a policy that
saves less does not fit, one that saves more does not.
"""

import dataclasses
from collections.abc import Callable, Iterator

from lm_jax.config import MeshConfig
from lm_jax.errors import UserError
from lm_jax.planning.compiled import Cost
from lm_jax.planning.programs import Program
from lm_jax.planning.topologies import Target
from lm_jax.training.flops import PEAK_FLOPS
from lm_jax.training.trainer import TrainConfig

_REMAT = ("full", "save_matmuls", "none")  # from the least memory to the most
_TENSOR = (1, 2, 4, 8)  # more would cut a layer across slow links
_ROWS = (1, 2, 4, 8)  # of a part of the mesh at a time


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings that were tried.

    Attributes:
      cost: of the step.
      seconds: estimate for a token slot, for ranking alone: arithmetic at the chips' peak and transfers at the links'
        full rate, one after the other. None where the chip is not known.
    """

    config: TrainConfig
    cost: Cost
    seconds: float | None

    @property
    def fits(self) -> bool:
        return self.cost.fits is not False


def search(
    config: TrainConfig,
    target: Target,
    lower: Callable[[TrainConfig], Program],
    compile_lowered: Callable[[Program], Cost],
    show: Callable[[Candidate], None],
) -> list[Candidate]:
    """The candidates that were compiled, first those that fit, fastest first.

    Args:
      lower: settings -> the step; raises UserError for settings that do not fit the model.
      compile_lowered: what the step costs.
      show: is called with every candidate as it comes.

    Raises:
      UserError: a step does not compile.
    """
    tried: list[Candidate] = []
    for mesh in _meshes(len(target.devices)):
        fitting = len(_ROWS)  # how many of _ROWS fitted with the policy before, which saves less
        for remat in _REMAT:
            done = 0
            for rows in _rows(config, mesh)[:fitting]:
                settings = _with(config, mesh, rows, remat)
                try:
                    program = lower(settings)
                except UserError:
                    break  # heads or widths that this mesh does not divide
                cost = compile_lowered(program)
                tried.append(Candidate(settings, cost, estimated_seconds(cost, target)))
                show(tried[-1])
                if not tried[-1].fits:
                    break
                done += 1
            fitting = done
    return sorted(tried, key=lambda c: (not c.fits, c.seconds if c.seconds is not None else c.cost.wire_bytes))


def estimated_seconds(cost: Cost, target: Target) -> float | None:
    """See `Candidate.seconds`."""
    peak = PEAK_FLOPS.get(target.devices[0].device_kind)
    if peak is None or target.links is None:
        return None
    program = cost.program
    arithmetic = program.model_flops * (program.recompute_factor or 1) / peak / len(target.devices)
    return (arithmetic + cost.wire_bytes / target.links) / program.tokens


def _meshes(devices: int) -> Iterator[MeshConfig]:
    for tensor in _TENSOR:
        if devices % tensor == 0:
            yield MeshConfig(1, devices // tensor, tensor)


def _rows(config: TrainConfig, mesh: MeshConfig) -> list[int]:
    """Rows at a time of each part of the mesh, as far as a step of the longest sequences has them."""
    parts, needed = mesh.data * mesh.fsdp, config.batch.size * config.batch.sequences // 2
    return [rows for rows in _ROWS if rows == 1 or rows * parts <= needed]


def _with(config: TrainConfig, mesh: MeshConfig, rows: int, remat: str) -> TrainConfig:
    batch = dataclasses.replace(config.batch, rows_per_device=rows)
    return dataclasses.replace(config, mesh=mesh, batch=batch, compute=dataclasses.replace(config.compute, remat=remat))
