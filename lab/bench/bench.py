"""`launch.bench`: ours and the peer in turn, on the same model, data and dtype; whether they agree, and the ratio.

Every side of a row is a process of its own, so that neither has the other's memory, threads or warm caches.
"""

import dataclasses
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lab.bench.material import PROMPT_LENGTHS, SLOT_LENGTH, prepare
from lab.commands import HUGE_PAGES
from lm_jax.console import say
from lm_jax.data.rows import replacing, write_text
from lm_jax.distributed import processes
from lm_jax.errors import UserError
from lm_jax.strict_json import dumps

Result = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """The keys of `configs/bench.py`."""

    model: str | None
    input: str | None
    output: str
    rows: tuple[str, ...]
    dtype: str
    num_pairs: int | None
    max_length: int
    batch_pairs: int
    prompts: int
    new_tokens: int
    layers: int
    growth: tuple[int, ...]

    def __post_init__(self):
        if not self.rows:
            raise UserError(f"config.rows: none given; choose from {', '.join(ROWS)}")
        if unknown := [row for row in self.rows if row not in ROWS]:
            raise UserError(f"config.rows: unknown {unknown[0]!r}; choose from {', '.join(ROWS)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"config.dtype: unknown {self.dtype!r}; choose float32 or bfloat16")
        for name in ("max_length", "batch_pairs", "prompts", "layers"):
            if getattr(self, name) < 1:
                raise UserError(f"config.{name}={getattr(self, name)}: must be at least 1")
        most = SLOT_LENGTH - PROMPT_LENGTHS[1]
        if not 1 <= self.new_tokens <= most:
            raise UserError(f"config.new_tokens={self.new_tokens}: must lie between 1 and {most}")
        if not self.growth or min(self.growth) < 1:
            raise UserError(f"config.growth={self.growth}: give at least one factor, of at least 1")


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing that is measured.

    Attributes:
      peers: name of the peer's run -> what is different about it.
      needs: modules of the peer.
      same: (ours, the peer's) -> what shows that both computed the same, and whether they did.
      once: each side does its work once, so that whole processes compare too: start, loading and compilation with it.
    """

    peers: Mapping[str, Mapping[str, Any]]
    needs: tuple[str, ...]
    same: Callable[[Result, Result], tuple[str, bool]]
    once: bool = False


def _same_epoch(a: Result, b: Result) -> tuple[str, bool]:
    # Where responses are truncated each cuts at a token of its own choice
    said = f"{a['tokens']} and {b['tokens']} tokens, first loss {a['first_loss']:.5f} and {b['first_loss']:.5f}"
    return said, abs(a["tokens"] - b["tokens"]) <= 1e-3 * b["tokens"] and abs(a["first_loss"] - b["first_loss"]) < 2e-3


def _same_texts(a: Result, b: Result) -> tuple[str, bool]:
    equal = sum(x == y for x, y in zip(a["texts"], b["texts"], strict=True)) / len(a["texts"])
    return f"{equal:.1%} of the texts are equal", equal > 0.9  # a tie in the logits may go either way


def _same_sums(a: Result, b: Result) -> tuple[str, bool]:
    said = f"the sum is {a['sum']:.6g} and {b['sum']:.6g}"
    return said, abs(a["sum"] - b["sum"]) <= 1e-4 * abs(b["sum"]) + 1e-3


# Batches of rows as they come, and of rows sorted by length, which pads less
_BATCHES = {"transformers": {"sorted": False}, "transformers sorted": {"sorted": True}}

ROWS = {
    "train": Row(
        {"TRL float32": {"dtype": "float32"}, "TRL bfloat16": {"dtype": "bfloat16"}},
        ("torch", "trl"),
        _same_epoch,
        once=True,
    ),
    "generate": Row(_BATCHES, ("torch",), _same_texts),
    "generate_ends": Row(_BATCHES, ("torch",), _same_texts),
    "score": Row(_BATCHES, ("torch",), _same_sums),
    # It leaves weights that have the dtype in the mapped file; what trains them, or an accelerator, takes a copy
    "load": Row({"transformers": {"copied": False}, "transformers copied": {"copied": True}}, ("torch",), _same_sums),
    "growth": Row({}, (), _same_sums),
}


def bench(config: BenchConfig) -> None:
    """Measures `config.rows`, prints a line for each peer, writes `bench.json` and a PNG for each row.

    Raises:
      UserError: a peer that is not installed, or a side that failed; rows before it are in `bench.json`.
    """
    if processes.link is not None:
        raise UserError("launch.bench starts processes of its own to compare; start it in one process")
    for row in config.rows:
        for module in ROWS[row].needs:
            if importlib.util.find_spec(module) is None:
                raise UserError(
                    f"config.rows: {row} needs {module}, which is not installed; run in the checkout: pip install -e "
                    f"'.[test]', or leave the row out: {_flag(tuple(r for r in config.rows if r != row))}"
                )
    output = Path(config.output)
    model = prepare(output, config.model, config.input, config.num_pairs, config.layers)
    report: dict[str, Any] = {"settings": dataclasses.asdict(config), "rows": {}}
    for name in config.rows:
        given = {
            "model": model,
            "pairs": str(output / "pairs.jsonl"),
            "dtype": config.dtype,
            "max_length": config.max_length,
            "batch_pairs": config.batch_pairs,
            "prompts": config.prompts,
            "new_tokens": config.new_tokens,
            "factors": config.growth,
        }
        say(f"{name}: ours")
        ours = _side("ours", name, given | {"output": str(_fresh(output / "runs" / name))})
        found = {"ours": ours, "peers": {}}
        for peer, different in ROWS[name].peers.items():
            say(f"{name}: {peer}")
            theirs = _side("peers", name, {**given, **different})
            said, same = ROWS[name].same(ours, theirs)
            measured = ("seconds", "bytes", "process_seconds") if ROWS[name].once else ("seconds", "bytes")
            ratios = {key: theirs[key] / ours[key] for key in measured if ours.get(key)}
            found["peers"][peer] = {**theirs, "same": same, "compared": said, "ratio": ratios}
            print(_line(name, peer, ours, theirs, ratios, said, same), flush=True)
        report["rows"][name] = found
        write_text(f"{output}/bench.json", dumps(report, indent=1) + "\n")
        _plot(output / f"{name}.png", name, found)
    say(f"written: {output}/bench.json, {output}/*.png")


def _flag(rows: tuple[str, ...]) -> str:
    return "--config.rows=" + shlex.quote(str(rows))


def _fresh(path: Path) -> Path:
    """A directory that is not there yet."""
    number = 1
    while (fresh := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return fresh


def _side(side: str, row: str, given: Mapping[str, Any]) -> dict[str, Any]:
    environment = HUGE_PAGES | os.environ  # of both sides
    if environment.get("JAX_PLATFORMS", "") == "cpu":
        # One JAX device a core: rows are independent, and small operations run on one core each
        environment.setdefault("JAX_NUM_CPU_DEVICES", str(_cores()))
    command = [sys.executable, "-m", f"lab.bench.{side}", row, json.dumps(given)]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - begin
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        raise UserError(f"row {row}, {side}: {last}")
    return json.loads(done.stdout.splitlines()[-1]) | {"process_seconds": seconds}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _line(
    row: str, peer: str, ours: Result, theirs: Result, ratios: Mapping[str, float], said: str, same: bool
) -> str:
    speed = f", {ours['tokens'] / ours['seconds']:,.0f} tokens/s" if "tokens" in ours else ""
    memory = (
        f", memory {ours['bytes'] / 2**20:.0f} against {theirs['bytes'] / 2**20:.0f} MiB" if "bytes" in ours else ""
    )
    whole = f" ({ratios['process_seconds']:.2f} of whole processes)" if "process_seconds" in ratios else ""
    share = ours.get("model_flops_utilization")
    peak = "" if share is None else f", {share:.1%} of the peak"
    return (
        f"{row:13} {ours['seconds']:8.2f} s against {theirs['seconds']:8.2f} s of {peer}: {ratios['seconds']:.2f} times"
        f"{whole}{speed}{peak}"
        f"{memory}; {'the same' if same else 'NOT THE SAME'}: {said}"
    )


def _plot(path: Path, row: str, found: Mapping[str, Any]) -> None:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    if "points" in found["ours"]:
        _plot_growth(figure, found["ours"]["points"])
    else:
        axis = figure.subplots()
        sides = {"ours": found["ours"], **found["peers"]}
        bars = axis.barh(list(sides), [side["seconds"] for side in sides.values()])
        axis.bar_label(bars, [f"{side['seconds']:.3g} s" for side in sides.values()], padding=3)
        axis.set(title=row, xlabel="seconds, lower is better")
        axis.invert_yaxis()
        axis.margins(x=0.15)
    with replacing(str(path)) as file:
        figure.savefig(file, format="png", dpi=120)


def _plot_growth(figure: Figure, points: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(point["axis"] for point in points))
    for axis, name in zip(figure.subplots(1, len(names)), names, strict=True):
        own = [point for point in points if point["axis"] == name]
        sizes = [point[name] for point in own]
        axis.plot(sizes, [1e3 * point["seconds"] for point in own], "o-", color="tab:blue", label="ms")
        beside = axis.twinx()
        beside.plot(sizes, [point["bytes"] / 2**20 for point in own], "s--", color="tab:orange", label="MiB")
        axis.set_xlabel(name)
        axis.set_ylabel("forward + backward, ms", color="tab:blue")
        beside.set_ylabel("temporary memory, MiB", color="tab:orange")
        axis.set_xscale("log", base=2)
        for each in (axis, beside):
            each.set_yscale("log")  # what grows with the size has slope 1, with its square 2
