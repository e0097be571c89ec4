"""`launch.lab_ablation`: the arms of both methods on seed models of a verifiable world, with intervals over seeds.

output/config.json                the settings
output/report.md .json            written anew after every arm, from the results alone
output/METHOD.png                 at the end
output/seed_N/seed/               what launch.lab_seed makes
output/seed_N/METHOD/data/ ...    what the arms of a method share
output/seed_N/METHOD/extras.json  what is measured once a seed
output/seed_N/METHOD/arms/ARM/    a directory for each learning rate, dev.json, answers, result.json: it appears last
output/compiled/                  what JAX compiled, which most steps share
"""

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from lab import steps as lab_steps
from lab.arms import DEV, TEST, Arms
from lab.commands import alone_in, logged, run_step
from lab.main_arms import LEFT_OUT as MAIN_LEFT_OUT
from lab.main_arms import SEED_ONLY, MainArms, MainArmsConfig, main_arms
from lab.musc_arms import DPO, MuscArms, MuscArmsConfig, musc_arms
from lab.musc_arms import LEFT_OUT as MUSC_LEFT_OUT
from lab.seed import copy_fitted
from lab.table import Method, markdown, plot_method, report_of
from lab.worlds.answers import shares, verdicts
from lab.worlds.gate import below_gate
from lab.worlds.worlds import WORLDS
from lm_jax.data.rows import write_jsonl, write_text
from lm_jax.errors import UserError
from lm_jax.generation.rounds import begin_directory

Row = dict[str, Any]
MUSC, MAIN, BOTH = CHOICES = ("musc", "main", "both")
SAMPLED, GREEDY = "sampled", "greedy"
_CACHE = "JAX_COMPILATION_CACHE_DIR"
# How it is computed and what is refused, not what comes out; more seeds and arms can follow
_MAY_CHANGE = ("output", "seeds", "arms", "processes", "gate", "fitted")


@dataclasses.dataclass(frozen=True)
class LabAblationConfig:
    """`configs/lab_ablation.py` says what each key is for."""

    output: str
    method: str
    world: str
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    fitted: str | None
    seed_rows: int
    gate: float
    rate_seeds: tuple[int, ...]
    dev: int
    test: int
    temperature: float
    processes: int
    musc: MuscArmsConfig
    main: MainArmsConfig

    def __post_init__(self):
        if self.method not in CHOICES:
            raise UserError(f"config.method={self.method!r}: must be {', '.join(CHOICES[:-1])} or {CHOICES[-1]}")
        if self.world not in WORLDS:
            raise UserError(f"config.world={self.world!r}: unknown world; choose {' or '.join(WORLDS)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UserError(f"config.seeds={self.seeds}: give at least one, each once, none below 0")
        if not set(self.rate_seeds) <= set(self.seeds):
            raise UserError(f"config.rate_seeds={self.rate_seeds}: all must be among config.seeds={self.seeds}")
        if self.fitted and len(self.seeds) > 1:
            raise UserError(f"config.fitted={self.fitted} is of one seed; set config.seeds to it, not to {self.seeds}")
        for name in ("seed_rows", "dev", "test", "processes"):
            if getattr(self, name) < 1:
                raise UserError(f"config.{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.gate <= 1:
            raise UserError(f"config.gate={self.gate}: must lie between 0 and 1")

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that are to be measured."""
        return (MUSC, MAIN) if self.method == BOTH else (self.method,)


def ablate(config: LabAblationConfig) -> None:
    """Measures every arm on every seed and writes the report. What is done stays: called again, it goes on.

    Raises:
      UserError: a step failed, a seed model is below its gate, an unknown arm, or `config.output` holds something else
        or is at work already.
    """
    config = dataclasses.replace(config, rate_seeds=config.rate_seeds or config.seeds[:1])  # it stays so
    methods = _methods(config)
    begin_directory(config.output, "lab_ablation", _settings(config), _MAY_CHANGE)
    with alone_in(Path(config.output)), _compiled_once(Path(config.output) / "compiled"):
        _Ablation(config, methods).do()


@contextlib.contextmanager
def _compiled_once(directory: Path) -> Iterator[None]:
    """What one step compiled the next ones find, if the environment does not say where already."""
    if _CACHE in os.environ:
        yield
        return
    # A step that was killed may have left half of an entry, which JAX would never write again
    shutil.rmtree(directory, ignore_errors=True)
    os.environ[_CACHE] = str(directory)
    try:
        yield
    finally:
        del os.environ[_CACHE]


def _settings(config: LabAblationConfig) -> Row:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _methods(config: LabAblationConfig) -> dict[str, Method]:
    """What the tables show, of the arms that are to be run.

    Raises:
      UserError: an arm that no chosen method has.
    """
    known = {
        MUSC: ({name: arm.about for name, arm in musc_arms().items()}, DPO, MUSC_LEFT_OUT),
        MAIN: (main_arms(config.main.rounds), SEED_ONLY, MAIN_LEFT_OUT),
    }
    found = {}
    for name in config.methods:
        about, base, left_out = known[name]
        wanted = {arm: what for arm, what in about.items() if not config.arms or arm in config.arms}
        found[name] = Method(name, wanted, base, {} if config.arms else left_out)
    names = {arm for name in config.methods for arm in known[name][0]}
    if unknown := [arm for arm in config.arms if arm not in names]:
        raise UserError(f"config.arms: unknown arm {unknown[0]!r}; choose from {', '.join(sorted(names))}")
    return found


class _Ablation:
    """The work on all seeds, and the report."""

    def __init__(self, config: LabAblationConfig, methods: Mapping[str, Method]):
        self._config, self._methods = config, methods
        self._root, self._world = Path(config.output), WORLDS[config.world]
        made: dict[str, Callable[[int], Arms]] = {
            MUSC: lambda seed: MuscArms(config.musc, self._world, seed, self._of(seed), methods[MUSC].about),
            MAIN: lambda seed: MainArms(config.main, self._world, seed, self._of(seed), methods[MAIN].about),
        }
        self._arms = {(name, seed): made[name](seed) for seed in config.seeds for name in methods}

    def do(self) -> None:
        """All that is missing: seed models, then what the arms of each share, then the arms."""
        self._all({f"seed_{seed}/seed": partial(self._fit, seed) for seed in self._config.seeds})
        self._check_gates()
        self._all({f"seed_{seed}/{name}": partial(self._prepare, name, seed) for name, seed in self._arms})
        self._each_arm(self._try_rates, self._config.rate_seeds)
        self._each_arm(self._measure, self._config.seeds)
        print(self._write_report(), flush=True)
        self._plot()

    def _each_arm(self, task: Callable[[str, int, str], None], seeds: Collection[int]) -> None:
        self._all(
            {
                f"seed_{seed}/{name}/{arm}": partial(task, name, seed, arm)
                for (name, seed), arms in self._arms.items()
                if seed in seeds
                for arm in arms.about
            }
        )

    def _all(self, tasks: Mapping[str, Callable[[], None]]) -> None:
        """Several at a time, each with a log of its own; one alone shows what it does."""
        processes = min(self._config.processes, len(tasks))
        if processes == 1:
            for task in tasks.values():
                task()
                self._write_report()
            return
        with ThreadPoolExecutor(processes, initializer=own_cores(processes)) as pool:
            waiting = [pool.submit(self._logged, name, task) for name, task in tasks.items()]
            try:
                for done in as_completed(waiting):
                    done.result()
                    self._write_report()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # those under way end, and what they did stays
                raise

    def _logged(self, name: str, task: Callable[[], None]) -> None:
        with logged(self._root / "logs" / f"{name.replace('/', '_')}.txt"):
            task()

    def _fit(self, seed: int) -> None:
        config, output = self._config, self._of(seed) / "seed"
        if config.fitted and not (output / "gate.json").exists():
            copy_fitted(Path(config.fitted), {"world": config.world, "seed": seed, "rows": config.seed_rows}, output)
        if not (output / "gate.json").exists():
            run_step(
                "launch.lab_seed",
                "--config=configs/lab_seed.py",
                f"--config.output={output}",
                f"--config.seed={seed}",
                f"--config.world={config.world}",
                f"--config.rows={config.seed_rows}",
                "--config.gate=0",
            )

    def _check_gates(self) -> None:
        """Of all seed models at once, so that one look says which seeds need others in their place."""
        least, weak = self._config.gate, []
        for seed in self._config.seeds:
            shares = json.loads((self._of(seed) / "seed/gate.json").read_text())
            if below := below_gate(shares, least):
                weak.append(f"seed {seed} ({below})")
        if weak:
            raise UserError(
                f"{self._root}: below the gate of {least:.0%}: {', '.join(weak)}: nothing can be learnt from such seed "
                "models; give other numbers in config.seeds, or a lower config.gate; what is fitted stays"
            )

    def _prepare(self, name: str, seed: int) -> None:
        arms, extras = self._arms[name, seed], self._of(seed) / name / "extras.json"
        if extras.exists() and all(self._result(name, seed, arm).exists() for arm in arms.about):
            return
        arms.prepare(self._config.dev, self._config.test)
        write_jsonl(str(extras), [arms.extras()])

    def _try_rates(self, name: str, seed: int, arm: str) -> None:
        """Trains the arm at each of its learning rates and writes what each is worth on the development split."""
        arms, here = self._arms[name, seed], self._arm(name, seed, arm)
        rates = arms.rates(arm)
        if len(rates) < 2 or (here / "dev.json").exists():
            return
        found = {}
        for rate in rates:
            began, place = time.monotonic(), f"{here}/{rate:g}"
            model = arms.train(arm, rate, place)
            seconds = round(time.monotonic() - began, 1)
            answered = self._shares(model, arms.asked(DEV), f"{place}/dev.jsonl", self._config.temperature)
            found[f"{rate:g}"] = {"all_met": answered["all_met"], "seconds": seconds}
        write_jsonl(f"{here}/dev.json", [found])

    def _measure(self, name: str, seed: int, arm: str) -> None:
        """Trains the arm at its learning rate, measures the model that comes out and writes the result."""
        result = self._result(name, seed, arm)
        if result.exists():
            return
        began, arms, here = time.monotonic(), self._arms[name, seed], result.parent
        rates = arms.rates(arm)
        dev = self._dev(name, arm) if len(rates) > 1 else {}
        best = best_rate(rates, list(dev.values())) if rates else None
        tried = dev[seed][f"{best:g}"]["seconds"] if seed in dev else 0.0  # it is trained already
        model = arms.base if best is None else arms.train(arm, best, f"{here}/{best:g}")
        test = {
            kind: self._shares(model, arms.asked(TEST), f"{here}/{kind}.jsonl", temperature)
            for kind, temperature in ((SAMPLED, self._config.temperature), (GREEDY, 0.0))
        }
        learnt = arms.learnt(arm, f"{here}/{best:g}" if best is not None else str(here))
        found = {"method": name, "seed": seed, "arm": arm, "rate": best, "rates": list(rates), "dev": dev, "test": test}
        found |= {"rows": learnt.rows, "truth": learnt.truth, "seconds": round(tried + time.monotonic() - began, 1)}
        write_jsonl(str(result), [found])
        for rate in rates:  # the runs of five seeds would fill a disk
            if rate != best:
                shutil.rmtree(f"{here}/{rate:g}", ignore_errors=True)

    def _dev(self, name: str, arm: str) -> dict[int, dict[str, Row]]:
        """Seed -> learning rate -> what `_try_rates` found."""
        files = {seed: self._arm(name, seed, arm) / "dev.json" for seed in self._config.rate_seeds}
        return {seed: json.loads(file.read_text()) for seed, file in files.items()}

    def _shares(self, model: str, asked: str, output: str, temperature: float) -> dict[str, float]:
        return shares(verdicts(self._world, lab_steps.answer(model, asked, output, temperature)))

    def _write_report(self) -> str:
        """From the results that are there; the Markdown."""
        tables = self._tables()
        shown = (markdown(self._methods[name], table, self._config.temperature) for name, table in tables.items())
        text = "\n".join(shown)
        write_jsonl(f"{self._root}/report.json", [tables])
        write_text(f"{self._root}/report.md", text)
        return text

    def _plot(self) -> None:
        for name, table in self._tables().items():
            plot_method(self._methods[name], table, f"{self._root}/{name}.png")

    def _tables(self) -> dict[str, Row]:
        """Method -> its report."""
        tables = {}
        for name, method in self._methods.items():
            results = [
                json.loads(path.read_text())
                for seed in self._config.seeds
                for arm in method.about
                if (path := self._result(name, seed, arm)).exists()
            ]
            extras = {
                seed: json.loads(path.read_text())
                for seed in self._config.seeds
                if (path := self._of(seed) / name / "extras.json").exists()
            }
            tables[name] = report_of(method, results, extras)
        return tables

    def _of(self, seed: int) -> Path:
        return self._root / f"seed_{seed}"

    def _arm(self, name: str, seed: int, arm: str) -> Path:
        return self._of(seed) / name / "arms" / arm

    def _result(self, name: str, seed: int, arm: str) -> Path:
        return self._arm(name, seed, arm) / "result.json"


def best_rate(rates: Sequence[float], dev: Sequence[Mapping[str, Row]]) -> float:
    """The learning rate of the highest share over all seeds; of equals the lowest, which changes the model least.

    Args:
      dev: of each seed `all_met` of each rate; none where there is no choice.
    """
    return max(sorted(rates), key=lambda rate: sum(found[f"{rate:g}"]["all_met"] for found in dev))


def own_cores(processes: int) -> Callable[[], None]:
    """What each of so many threads calls first: the steps that it starts have a share of the cores to themselves.

    Two small models on two cores train a fifth faster so, since neither waits for threads of the other.
    """
    cores: list[int] = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    shares = [cores[n::processes] for n in range(processes)] if len(cores) >= processes else []

    def take() -> None:
        if shares:
            os.sched_setaffinity(0, shares.pop())  # of this thread alone, and of what it starts

    return take
