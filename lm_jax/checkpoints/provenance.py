"""What a run is made of and with: recorded in its config.json when it begins, told by the model card of its export."""

import dataclasses
import importlib.metadata
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath
from huggingface_hub import ModelCard

from lm_jax.errors import without_passwords

_PACKAGES = ("lm-jax", "jax", "flax", "optax", "transformers")
_LICENSE = ("license", "license_name", "license_link")


@dataclasses.dataclass(frozen=True)
class Method:
    """What a command does to a model, in words.

    Attributes:
      summary: Markdown.
      tags: as the hub has them.
    """

    summary: str
    tags: tuple[str, ...]


def made_with() -> dict[str, Any]:
    """The command line, versions and devices of this process, ready for JSON."""
    line = shlex.join(["python", "-m", f"launch.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    devices = jax.devices()
    return {
        "command_line": without_passwords(line),
        "versions": {"python": platform.python_version()} | {p: v for p in _PACKAGES if (v := _version(p))},
        "devices": f"{len(devices)} x {devices[0].device_kind}",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return None


def origin(given: str, directory: str, data: str, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """Where a model and its data are from, as far as the hub knows it.

    Args:
      given: the model as the user named it, and `directory` where it lies.
      data: likewise.
      before: the origin of the run that the model is from; None: it is no run.

    Returns:
      `base_model`, a hub id or None; `license`, what the base model's card says of it; `datasets`, hub ids.
    """
    if before is None:
        before = {"base_model": _hub_id(given), "license": _license(directory), "datasets": []}
    return {**before, "datasets": sorted({*before["datasets"], *filter(None, [_hub_id(data)])})}


def _hub_id(given: str) -> str | None:
    """`given` has been read: what lies nowhere here came from the hub."""
    location = re.sub(r":\w+$", "", given)
    return None if "://" in given or epath.Path(given).exists() or epath.Path(location).exists() else location


def _license(directory: str) -> dict[str, str]:
    path = Path(directory) / "README.md"
    if not path.is_file():
        return {}
    try:
        data = ModelCard.load(path).data.to_dict()
    except Exception:  # the card is another's, and may hold anything
        return {}
    return {key: data[key] for key in _LICENSE if isinstance(data.get(key), str)}
