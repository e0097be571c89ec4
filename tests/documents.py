"""README.md and docs/ as tests read them: the commands that they show."""

import dataclasses
import re
import shlex

from tests.conftest import ROOT

# Results are of their day: what was run then stays as it was run
PAGES = ("README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md") if p.name != "results.md"))


@dataclasses.dataclass(frozen=True)
class Command:
    """A documented command: its place, its launcher, and what stands behind `python -m launch.NAME`."""

    where: str
    name: str
    flags: tuple[str, ...]


def page_text(page: str) -> str:
    return (ROOT / page).read_text()


def commands(text: str, where: str = "") -> list[Command]:
    """The commands of a text, in their order; lines that end with a backslash go on in the next one."""
    joined = re.sub(r"\\\n\s*", "", text)
    found = re.finditer(r"python -m launch\.(\w+)([^`#\n]*)", joined)
    return [Command(f"{where}-{i}-{m[1]}", m[1], _flags(m[1], shlex.split(m[2]))) for i, m in enumerate(found)]


def _flags(name: str, given: list[str]) -> tuple[str, ...]:
    """Where no config file is given it is the command's own."""
    own = [] if any(flag.startswith("--config=") for flag in given) else [f"--config=configs/{name}.py"]
    return (*own, *given)


def all_commands() -> list[Command]:
    """Those of all pages."""
    return [command for page in PAGES for command in commands(page_text(page), page)]
