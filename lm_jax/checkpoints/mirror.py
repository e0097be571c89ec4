"""A run's copy in a bucket, from which the same command goes on on a fresh machine.

    REMOTE/config.json, model/      as in the run directory, written when the run begins; config.json last
    REMOTE/metrics.jsonl            as of the newest checkpoint or later; loggers.json likewise
    REMOTE/checkpoints/STEP/        the checkpoint's files, and from each process part.PROCESS-of-COUNT.json, its last
    REMOTE/owner.json               who writes

A checkpoint counts once the parts of all processes are there and of the same save. Nothing else is atomic in a bucket,
and there are no locks: the newest start takes the copy over, and the run that had it ends at its next save.
"""

import json
import re
import shutil
import uuid
import zlib
from pathlib import Path

from etils import epath

from lm_jax.checkpoints import buckets as storage
from lm_jax.checkpoints.checksums import damage, written_by
from lm_jax.console import say
from lm_jax.errors import UserError

_PART = re.compile(r"(\d+)/part\.(\d+)-of-(\d+)\.json")
_SETTINGS, _MODEL, _OWNER = "config.json", "model", "owner.json"
_BESIDE = ("metrics.jsonl", "loggers.json")  # what grows along with the checkpoints


class Mirror:
    """The copy of a run directory, while the run goes on.

    Args:
      remote: its address.
      run: the run directory.
      keep: newest checkpoints kept there.
      process, count: which process this is, of how many.
    """

    def __init__(self, remote: str, run: str, keep: int, process: int, count: int):
        self.remote = remote.rstrip("/")
        self._run, self._keep, self._process, self._count = Path(run), keep, process, count
        self._owner = uuid.uuid4().hex.encode()
        if process == 0:
            storage.write(f"{self.remote}/{_OWNER}", self._owner)

    def push(self, step: int) -> None:
        """Copies what this process wrote of a checkpoint that is whole; every process calls it.

        Raises:
          UserError: the bucket refuses, or another run has taken the copy over.
        """
        local, there = self._run / "checkpoints" / str(step), f"{self.remote}/checkpoints/{step}"
        if self._process == 0:
            self._check_owner()
            for name in _BESIDE:
                if (self._run / name).exists():
                    storage.write(f"{self.remote}/{name}", (self._run / name).read_bytes())
        names = written_by(local, self._process)
        storage.upload(local, names, there)
        part = json.dumps({"save": _save_of(local), "files": names})
        storage.write(f"{there}/part.{self._process}-of-{self._count}.json", part.encode())
        if self._process == 0:
            self._prune(step)

    def push_missing(self, step: int) -> None:
        """`push`, of a checkpoint that a run wrote which was killed before it was copied."""
        if step not in whole_steps(self.remote):
            self.push(step)

    def _check_owner(self) -> None:
        if storage.read(f"{self.remote}/{_OWNER}") != self._owner:
            raise UserError(
                f"{self.remote}: another start of this run has taken it over; let that one go on, or end it and start "
                "this one again"
            )

    def _prune(self, step: int) -> None:
        kept = sorted({step, *whole_steps(self.remote)})[-self._keep :]
        old = [n for n in storage.find(f"{self.remote}/checkpoints") if int(n.partition("/")[0]) < kept[0]]
        for parts in (True, False):  # parts first: what is left of a kill in between is no whole checkpoint
            storage.remove(f"{self.remote}/checkpoints/{n}" for n in old if bool(_PART.fullmatch(n)) == parts)


def _save_of(checkpoint: Path) -> int:
    """A number that all processes find the same, and another one in another save of the same step."""
    return zlib.crc32((checkpoint / "_CHECKPOINT_METADATA").read_bytes())


def whole_steps(remote: str) -> dict[int, list[str]]:
    """Step -> names of the files, for every checkpoint whose parts are all there."""
    parts: dict[tuple[int, int], list[str]] = {}
    for name in storage.find(f"{remote}/checkpoints"):
        if part := _PART.fullmatch(name):
            parts.setdefault((int(part[1]), int(part[3])), []).append(name)
    found = {}
    for (step, count), names in sorted(parts.items()):
        if len(names) == count:
            read = [json.loads(storage.read(f"{remote}/checkpoints/{name}") or b"{}") for name in names]
            if len({part.get("save") for part in read}) == 1 and all("files" in part for part in read):
                found[step] = sorted(name for part in read for name in part["files"])
    return found


def holds_run(remote: str) -> bool:
    """Whether a run was begun with this copy."""
    storage.check_bucket(remote)
    return storage.exists(f"{remote}/{_SETTINGS}")


def push_settings(remote: str, run: str) -> None:
    """Copies what a run begins with; its settings last."""
    model = Path(run, _MODEL)
    names = [str(p.relative_to(model)) for p in model.rglob("*") if p.is_file()]
    storage.upload(model, names, f"{remote}/{_MODEL}")
    storage.upload(run, [_SETTINGS], remote)


def fetch(remote: str, run: str) -> None:
    """Brings a run directory up to its copy: all of it, or what another machine has added since.

    Args:
      run: absent, empty, what a `fetch` that was killed left, or the same run's directory.

    Raises:
      UserError: a checkpoint is there and none arrives undamaged.
    """
    root = Path(run)
    if not (root / _SETTINGS).exists():
        shutil.rmtree(root / _MODEL, ignore_errors=True)
        storage.download(f"{remote}/{_MODEL}", storage.find(f"{remote}/{_MODEL}"), root / _MODEL)
        _fetch_file(f"{remote}/{_SETTINGS}", root / _SETTINGS)
    here = [int(p.name) for p in root.glob("checkpoints/*") if p.name.isdigit()]
    newer = {step: names for step, names in whole_steps(remote).items() if step > max(here, default=-1)}
    if not newer:
        return
    for name in _BESIDE:  # they reach as far as the checkpoints do; what goes beyond the one that is taken is dropped
        _fetch_file(f"{remote}/{name}", root / name)
    for step in sorted(newer, reverse=True):
        if _fetch_step(f"{remote}/checkpoints/{step}", newer[step], root / "checkpoints" / str(step)):
            say(f"fetched {remote}/checkpoints/{step}")
            return
    raise UserError(f"{remote}: no newer checkpoint arrives undamaged; restore one, or delete those steps there")


def cached_run(remote: str, step: int | None) -> Path | None:
    """A local copy of what a run's model needs, with one checkpoint; None where there is no run.

    Args:
      step: None for the newest.

    Raises:
      UserError: no such checkpoint.
    """
    found = storage.find(remote)
    if not (_SETTINGS in found and f"{_MODEL}/config.json" in found):
        return None
    whole = whole_steps(remote)
    step = max(whole, default=None) if step is None else step
    if step not in whole:
        raise UserError(f"{remote}: no checkpoint of step {step}; it has {[*whole] or 'none'}; let the run save one")
    wanted = [_SETTINGS, *(f"checkpoints/{step}/{name}" for name in whole[step])]
    wanted += [name for name in found if name.startswith(f"{_MODEL}/")]
    return storage.cached(remote, {name: found[name] for name in wanted}, ("metrics.jsonl",))


def _fetch_step(there: str, names: list[str], target: Path) -> bool:
    arriving = target.parent.parent / "arriving"
    shutil.rmtree(arriving, ignore_errors=True)
    storage.download(there, names, arriving)
    if fault := damage(epath.Path(arriving)):
        say(f"{there}: damaged: {fault}; trying an older one")
        return False
    target.parent.mkdir(exist_ok=True)
    arriving.rename(target)
    return True


def _fetch_file(there: str, target: Path) -> None:
    if (content := storage.read(there)) is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.tmp")
        temporary.write_bytes(content)
        temporary.replace(target)
