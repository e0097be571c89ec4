"""Commands that go round by round, each in a directory of its own: what methods that iterate share."""

import contextlib
import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from etils import epath

from lm_jax.checkpoints.runs import open_model
from lm_jax.checkpoints.settings import check_same_settings, rows_content, write_settings
from lm_jax.console import say
from lm_jax.data.journal import rows_fingerprint
from lm_jax.data.rows import write_jsonl
from lm_jax.distributed.processes import everywhere
from lm_jax.errors import UserError

Row = dict[str, Any]
Rows = Sequence[Mapping[str, Any]]
NO_ENDPOINT = {"url": "", "model": "", "concurrency": 1, "timeout": 1.0}  # a server would not have what rounds train


def round_directory(output: str, number: int) -> str:
    return f"{output}/round_{number}"


@contextlib.contextmanager
def naming(section: str, keys: Collection[str]) -> Iterator[None]:
    """Errors of a part name its settings as the rounds call them: config.KEY becomes config.SECTION.KEY."""
    try:
        yield
    except UserError as error:
        names = "|".join(map(re.escape, keys))
        raise UserError(re.sub(rf"\bconfig\.(?=(?:{names})\b)", f"config.{section}.", str(error))) from error


def begin_directory(
    output: str, command: str, settings: Mapping[str, Any], may_change: Collection[str], **further: Mapping[str, Any]
) -> None:
    """Makes the directory of a command of many parts, with `config.json`, or finds the same one to continue.

    Args:
      settings: nested plain values.
      may_change: as `check_same_settings` has it.
      further: `made_from` and `derived`, see `lm_jax.checkpoints.settings`.

    Raises:
      UserError: the directory holds something else, or the command's with other settings, rows or weights.
    """
    root = epath.Path(output)
    description, path = {"command": command, "config": settings, **further}, root / "config.json"
    if path.exists():
        check_same_settings(path, description, may_change)
        return
    if root.exists() and {p.name for p in root.iterdir()} - {"config.json.tmp"}:
        raise UserError(f"{root}: not empty and none of {command}'s; give another config.output")
    root.mkdir(parents=True, exist_ok=True)
    write_settings(path, description)


def made_from(models: Mapping[str, str | None], rows: Mapping[str, Rows]) -> dict[str, Any]:
    """What a command's settings name, by its content; see `lm_jax.checkpoints.settings`. None is left out.

    Args:
      rows: what is used of a file's rows, in plain values.
    """
    contents = {key: open_model(model).content() for key, model in models.items() if model is not None}
    return contents | {key: rows_content(len(own), rows_fingerprint(own, f"config.{key}")) for key, own in rows.items()}


def _read_whole(path: epath.Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def do_rounds(output: str, numbers: Iterable[int], do: Callable[[int], Row], table: Callable[[list[Row]], str]) -> None:
    """Does the rounds that are missing and prints the table of all.

    `round_N/round.json` appears when round N is done, which is then not looked at again; `rounds.jsonl` has its row.

    Args:
      do: number of a round -> its row in the report.
    """
    rows: list[Row] = []
    for number in numbers:
        done = epath.Path(round_directory(output, number)) / "round.json"
        row = everywhere(partial(_read_whole, done))
        if row is None:
            row = do(number)
            if jax.process_index() == 0:
                write_jsonl(str(done), [row])
        else:
            say(f"round {number}: done already")
        rows.append(row)
        if jax.process_index() == 0:
            write_jsonl(f"{output}/rounds.jsonl", rows)
    if jax.process_index() == 0:
        print(table(rows), flush=True)


def do_parts(
    number: int,
    parts: Mapping[str, Callable[[], None]],
    named: Callable[[str], contextlib.AbstractContextManager],
) -> dict[str, float]:
    """Calls a round's parts in their order.

    Args:
      named: name of a part -> what names its settings in errors, see `naming`.

    Returns:
      Seconds that each took.

    Raises:
      UserError: what a part raises, with the round's number.
    """
    seconds = {}
    for name, part in parts.items():
        begin = time.monotonic()
        try:
            with named(name):
                part()
                everywhere(lambda: None)  # the next part reads what process 0 may still be writing
        except UserError as error:
            raise UserError(f"round {number}: {error}") from error
        seconds[name] = round(time.monotonic() - begin, 1)
    return seconds


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns, to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)
