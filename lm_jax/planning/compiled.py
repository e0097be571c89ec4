"""Compiles a program for devices that need not be there, and tells what it takes of them."""

import dataclasses
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from lm_jax.errors import UserError
from lm_jax.planning.hlo import KINDS, Collective, collectives
from lm_jax.planning.programs import Program
from lm_jax.planning.topologies import Target

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Both of the compiler's ways to say what it needs and what there is
_REFUSALS = (
    r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
    r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one run of a program takes of a device.

    Attributes:
      hbm: bytes in memory at the same time, at most: arguments, results that are none of them, temporaries, code and
        what lies beside. Where the compiler refuses the program: what it says that it would need.
      hbm_limit: bytes that there are; None where it is not known.
      arguments, temporaries, peak: parts of it as the compiler has them; None where it refuses.
      found: its collectives; empty where the compiler refuses.
      compile_seconds: here.
    """

    program: Program
    hbm: int
    hbm_limit: int | None
    arguments: int | None
    temporaries: int | None
    peak: int | None
    found: Sequence[Collective]
    compile_seconds: float

    @property
    def fits(self) -> bool | None:
        """None where the limit is not known."""
        return None if self.hbm_limit is None else self.hbm <= self.hbm_limit

    @property
    def wire_bytes(self) -> int:
        return sum(c.wire_bytes for c in self.found)

    def by_kind(self) -> dict[str, dict[str, int]]:
        """kind -> runs of its collectives, bytes of their arrays and bytes sent, on one device."""
        table = {}
        for kind in KINDS:
            own = [c for c in self.found if c.kind == kind]
            if own:
                table[kind] = {
                    "count": sum(c.runs for c in own),
                    "bytes": sum(c.runs * c.bytes for c in own),
                    "wire_bytes": sum(c.wire_bytes for c in own),
                }
        return table

    def to_json(self) -> dict[str, Any]:
        largest = sorted(self.found, key=lambda c: -c.wire_bytes)[:8]
        return {
            "hbm_bytes_per_chip": self.hbm,
            "hbm_limit_bytes": self.hbm_limit,
            "fits": self.fits,
            "argument_bytes": self.arguments,
            "temporary_bytes": self.temporaries,
            "peak_bytes": self.peak,
            "beside_bytes": self.program.beside,
            "tokens": self.program.tokens,
            "model_flops": self.program.model_flops,
            "recompute_factor": self.program.recompute_factor,
            "collectives": self.by_kind(),
            "largest_collectives": [dataclasses.asdict(c) | {"wire_bytes": c.wire_bytes} for c in largest],
            "compile_seconds": round(self.compile_seconds, 1),
        }


def compile_program(program: Program, target: Target) -> Cost:
    """Compiles for `target`; what does not fit its memory is an answer, no error.

    Raises:
      UserError: the compiler refuses it for another reason.
    """
    with tempfile.TemporaryDirectory() as directory:
        return _compile(program, target, directory)


def _compile(program: Program, target: Target, directory: str) -> Cost:
    begin = time.monotonic()
    # What the TPU's compiler writes down there is read where JAX cannot show its result
    options: dict[str, str | bool] = {"xla_dump_to": directory} if target.devices[0].platform == "tpu" else {}
    try:
        compiled = program.lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        needed, limit = _refusal(program.name, str(error))
        return Cost(program, needed + program.beside, limit, None, None, None, (), time.monotonic() - begin)
    seconds = time.monotonic() - begin
    memory: Any = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    own = memory.argument_size_in_bytes + results + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return Cost(
        program=program,
        hbm=own + program.beside,
        hbm_limit=target.hbm,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        found=collectives(_text(compiled, directory), len(target.devices)),
        compile_seconds=seconds,
    )


def _text(compiled: jax.stages.Compiled, directory: str) -> str:
    try:
        return compiled.as_text() or ""
    except jax.errors.JaxRuntimeError:  # instructions of a newer XLA than jaxlib's
        (path,) = Path(directory).glob("*.after_codegen.txt")
        return path.read_text()


def _refusal(name: str, message: str) -> tuple[int, int]:
    """(bytes needed, bytes there are) of a program that is too large."""
    for pattern in _REFUSALS:
        if "RESOURCE_EXHAUSTED" in message and (found := re.search(pattern, message, re.IGNORECASE)):
            needed, n, limit, m = found.groups()
            return round(float(needed) * _UNITS[n.upper()]), round(float(limit) * _UNITS[m.upper()])
    raise UserError(f"the {name} program does not compile: {message.splitlines()[0]}")
