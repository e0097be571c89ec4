"""What a run directory was begun with, in its `config.json`, and whether the same command may go on there.

command        which one
config         its settings
made_from      setting -> {"fingerprint": of what lies where it points, ...}: rows and weights by their content, so
               that a file may be moved, renamed or written again, and one that was edited is no longer the run's
derived        settings that were left open and follow from the others and the rows
base           of a run that trains adapters: the model that they belong to
method, origin, made_with     what a model card tells
"""

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from etils import epath

from lm_jax.errors import UserError
from lm_jax.strict_json import dumps

Contents = Mapping[str, Mapping[str, Any]]  # `made_from`


def rows_content(number: int, fingerprint: str, tokenizer: str | None = None) -> dict[str, Any]:
    """An entry of `made_from`: of a file of rows.

    Args:
      number: of the rows that are used.
      fingerprint: of all of them that is used, in their order.
      tokenizer: its fingerprint, where that of the rows is of their token ids.
    """
    return {"rows": number, "fingerprint": fingerprint} | ({"tokenizer": tokenizer} if tokenizer else {})


def write_settings(path: epath.Path, description: Mapping[str, Any]) -> None:
    """Writes what a run was begun with, whole or not at all.

    Args:
      description: `command`, `config` as nested plain values, and the rest of what the module's docstring lists.
    """
    temporary = path.parent / f"{path.name}.tmp"
    temporary.write_text(dumps(description, indent=2) + "\n")
    temporary.replace(path)


def check_same_settings(path: epath.Path, description: Mapping[str, Any], may_change: Collection[str]) -> None:
    """Compares with what `write_settings` wrote. A setting that `made_from` names counts by its content alone.

    Args:
      may_change: dotted names of settings, or of groups of them.

    Raises:
      UserError: of another command, other rows or weights, or a setting that differs and may not.
    """
    found, now = _read_settings(path), json.loads(dumps(description))
    if found.get("command") != now["command"]:
        raise UserError(f"{path}: belongs to {found.get('command')}; give another config.output")
    contents = now.get("made_from", {})
    may = (*may_change, *contents)
    _compare(path, found["config"], now["config"], lambda key: any(f"{key}.".startswith(f"{name}.") for name in may))
    if contents and "made_from" not in found:
        raise UserError(
            f"{path}: begun by an older version, which did not note the rows and weights that a run is made from; give "
            "another config.output"
        )
    given = flat_settings(now["config"])
    for key, content in contents.items():
        if fault := _content_fault(f"config.{key}={given.get(key)}", found["made_from"].get(key), content):
            raise UserError(f"{path}: {fault}, or give another config.output")
    _compare(path, found.get("derived", {}), now.get("derived", {}), lambda key: False)


def _compare(path: epath.Path, before: Mapping[str, Any], now: Mapping[str, Any], may_change: Callable[[str], bool]):
    before, now = flat_settings(before), flat_settings(now)
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key) and not may_change(key):
            raise UserError(
                f"{path}: this run was begun with config.{key}={before.get(key)!r}, now {now.get(key)!r}; "
                f"continue with the same settings or give another config.output"
            )


def _content_fault(name: str, before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str | None:
    """How what lies at a setting's place differs from what the run was begun with, and the cure."""
    if before is None:
        return f"this run was begun without {name}; leave it out"
    if before["fingerprint"] == now["fingerprint"]:
        return None
    if "rows" not in now:
        steps = f" (step {before['step']}, now {now['step']})" if now.get("step") is not None else ""
        return f"this run was begun on other weights than {name} holds now{steps}; put those back"
    if before.get("tokenizer") != now.get("tokenizer"):
        return f"the tokenizer or chat template that reads {name} is another than when this run was begun; put it back"
    same = before["rows"] == now["rows"]
    told = f"{now['rows']} as now, but not the same" if same else f"{before['rows']}, now {now['rows']}"
    return f"this run was begun with other rows than {name} holds now ({told}); put the old rows back"


def read_settings(run: str | epath.Path) -> dict[str, Any]:
    """What `write_settings` wrote into a run directory.

    Raises:
      UserError: nothing of the kind there.
    """
    return _read_settings(epath.Path(run) / "config.json")


def _read_settings(path: epath.Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except (ValueError, OSError):
        settings = None
    if not isinstance(settings, dict) or not isinstance(settings.get("config"), dict):
        raise UserError(f"{path}: not the settings of a run; give another directory")
    return settings


def flat_settings(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flat_settings(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def training_records(run: str) -> list[dict[str, Any]]:
    """A run directory's metrics, those of the evaluations too, in the order of the steps.

    What was not finite, null in the file, is left out, as is a last line that is being written.
    """
    lines = (epath.Path(run) / "metrics.jsonl").read_text().split("\n")[:-1]
    return [{name: value for name, value in json.loads(line).items() if value is not None} for line in lines]
