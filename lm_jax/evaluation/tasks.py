"""lm-eval's tasks by name or file: found, run, and their results side by side."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_jax.data.tokenizers import first_line
from lm_jax.errors import UserError
from lm_jax.evaluation.lm_eval_setup import prepare_ifeval, require_lm_eval
from lm_jax.strict_json import finite

_BOOTSTRAPS = 1000  # of the standard error of metrics that are no means
_USE_IFEVAL = ("ifeval", "leaderboard")  # tasks, and groups of them


class Tasks:
    """The tasks that were asked for, with their data.

    Args:
      names: lm-eval's names of tasks, groups or tags, or paths of YAML files.
      include_path: directory with more task files, whose names then count too.

    Raises:
      UserError: a task that is not known, or whose file or data cannot be loaded; the extra `eval` is not installed.
    """

    def __init__(self, names: Sequence[str], include_path: str | None):
        require_lm_eval()
        if include_path is not None and not Path(include_path).is_dir():
            raise UserError(f"config.include_path={include_path!r}: no such directory; check the path")
        for name in names:
            if (file := _file_of(name)) is not None and not file.is_file():
                raise UserError(f"config.tasks: {name}: no such file; check the path")
        if any(part in name for name in names for part in _USE_IFEVAL):
            prepare_ifeval()
        from lm_eval.tasks import TaskManager

        self._manager = TaskManager(include_path=include_path)
        for name in names:
            self._check(name)

    def _check(self, name: str) -> None:
        if _file_of(name) is None and name not in self._manager.all_tasks:
            near = [task for task in self._manager.all_tasks if name.lower() in task.lower()][:5]
            told = f" (near: {', '.join(near)})" if near else ""
            raise UserError(
                f"config.tasks: {name!r}: no such task in lm-eval{told}; give a "
                "name that `lm-eval ls tasks` shows, a YAML file, or config.include_path"
            )
        try:
            self._manager.load([_spec(name)])
        except Exception as error:  # a task's file, its code and its data may raise anything
            raise UserError(
                f"config.tasks: {name}: cannot be loaded ({type(error).__name__}: {first_line(error)}); check the "
                "file, or the network that its data come from"
            ) from error

    def run(
        self, name: str, lm: Any, num_fewshot: int | None, limit: int | None, chat_template: bool
    ) -> dict[str, Any]:
        """Runs one task, or all of a group.

        Returns:
          lm-eval's `results` (task -> "metric,filter" -> value), `higher_is_better`, `versions`, `n-shot`, `n-samples`,
          and `samples`: task -> rows with question, answers and verdicts.

        Raises:
          UserError: what the model or the task refuses.
        """
        from lm_eval.evaluator import simple_evaluate

        with _in_one_process():
            try:
                found = simple_evaluate(
                    lm,
                    tasks=[_spec(name)],
                    num_fewshot=num_fewshot,
                    limit=limit,
                    apply_chat_template=chat_template,
                    task_manager=self._manager,
                    bootstrap_iters=_BOOTSTRAPS,
                )
            except (UserError, OSError, MemoryError):
                raise
            except Exception as error:  # tasks are others' code
                raise UserError(
                    f"config.tasks: {name}: fails in lm-eval ({type(error).__name__}: {first_line(error)}); try it "
                    "with config.limit=2, or leave it out"
                ) from error
        kept = ("results", "higher_is_better", "versions", "n-shot", "n-samples", "samples")
        return _plain({key: found[key] for key in kept})


def table(models: Sequence[str], results: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each metric of each task.

    Args:
      models: their names.
      results: of each model: task -> "metric,filter" -> value.

    Returns:
      Rows with `task`, `metric`, `values` and `stderrs` (one a model, None where lm-eval gives none), and
      `difference` (the last model's value minus the first's) where there are several models. None: not finite.
    """
    rows = []
    for task, first in results[0].items():
        for key in first:
            metric, _, filter_name = key.partition(",")
            if metric.endswith("_stderr") or not filter_name:  # an alias, the number of samples
                continue
            values = [own[task][key] for own in results]  # None where it is not finite
            if any(isinstance(value, bool) or not isinstance(value, int | float | None) for value in values):
                continue
            stderrs = [own[task].get(f"{metric}_stderr,{filter_name}") for own in results]
            row = {
                "task": task,
                "metric": metric if filter_name == "none" else f"{metric} ({filter_name})",
                "values": values,
                "stderrs": [s if isinstance(s, int | float) else None for s in stderrs],
            }
            both = None not in (values[0], values[-1])
            rows.append(row | ({"difference": values[-1] - values[0] if both else None} if len(models) > 1 else {}))
    return rows


def markdown(models: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `table` as a Markdown table."""
    several = len(models) > 1
    lines = [["task", "metric", *models, *(["difference"] if several else [])]]
    lines.append(["---", "---", *["---:"] * (len(lines[0]) - 2)])
    for row in rows:
        told = [
            "not finite" if value is None else f"{value:.4f}" + (f" ± {stderr:.4f}" if stderr is not None else "")
            for value, stderr in zip(row["values"], row["stderrs"], strict=True)
        ]
        difference = [] if not several else [""] if row["difference"] is None else [f"{row['difference']:+.4f}"]
        lines.append([row["task"], row["metric"], *told, *difference])
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def task_fingerprint(name: str, include_path: str | None) -> str | None:
    """sha256 (hex) over the user's own file of a task and those that it names: rows, code, what it includes.

    None: the task is lm-eval's. Its file is the one that `name` is, or the one below `include_path` that has this name.
    """
    if Path(name).is_file():
        files = [Path(name)]
    else:
        given = re.compile(rf"^(?:task|group):[ \t]*['\"]?{re.escape(name)}['\"]?[ \t]*(?:#.*)?$", re.MULTILINE)
        below = sorted(Path(include_path).rglob("*.y*ml")) if include_path is not None else []
        files = [file for file in below if given.search(_text(file))][:1]
    for file in files:  # which grows
        if file.suffix in (".yaml", ".yml"):
            words = (word for word in re.findall(r"[^\s'\"\[\]{},]+", _text(file)) if re.search("[./]", word))
            places = (place for word in words for place in (Path(word), file.parent / word, _code(file, word)))
            files += [place for place in dict.fromkeys(places) if place not in files and os.path.isfile(place)]
    contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return hashlib.sha256(" ".join(contents).encode()).hexdigest() if files else None


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _code(file: Path, word: str) -> Path:
    """Of `!function module.name`."""
    return file.parent / f"{word.rpartition('.')[0]}.py"


def _file_of(name: str) -> Path | None:
    return Path(name) if name.endswith((".yaml", ".yml")) else None


def _spec(name: str) -> str:
    file = _file_of(name)
    return name if file is None else str(file.absolute())


@contextlib.contextmanager
def _in_one_process() -> Iterator[None]:
    """lm-eval draws bootstrap samples in forked processes, which hang where XLA's threads were forked along."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def _plain(value: Any) -> Any:
    """As JSON has it; lm-eval's rows may hold what it does not. What is not finite is None."""
    from lm_eval.utils import handle_non_serializable

    return finite(json.loads(json.dumps(value, default=handle_non_serializable)))
