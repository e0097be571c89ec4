"""Checksums of a checkpoint's files: orbax and tensorstore read a flipped bit of an array as another number.

Each process sums what it wrote, when the checkpoint is whole, into `checksums.PROCESS.json` beside it.
"""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

from etils import epath

_BLOCK = 1 << 24  # bytes read at a time
_THREADS = 8
_OWN = re.compile(r"(?:^|/)ocdbt\.process_(\d+)/")  # the directory in which one process writes


def _writer(file: str) -> int:
    own = _OWN.search(file)
    return int(own[1]) if own else 0


def written_by(checkpoint: str | os.PathLike, process: int) -> list[str]:
    """The files that a process wrote, and its sums; of process 0 those that belong to nobody, too."""
    return [*_written_by(epath.Path(checkpoint), process), _name(process)]


def _written_by(checkpoint: epath.Path, process: int) -> list[str]:
    return [f for f in _files(checkpoint) if _writer(f) == process]


def _name(process: int) -> str:
    return f"checksums.{process}.json"


def write_checksums(checkpoint: epath.Path, process: int) -> None:
    """Sums the files that this process wrote; process 0 those that belong to nobody, too."""
    files = _written_by(checkpoint, process)
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = dict(zip(files, pool.map(lambda f: _sum(checkpoint / f), files), strict=True))
    temporary = checkpoint / f".checksums.{process}.tmp"
    temporary.write_text(json.dumps({"crc32": sums}) + "\n")
    temporary.rename(checkpoint / _name(process))


def damage(checkpoint: epath.Path, share: int = 0, shares: int = 1, items: Collection[str] | None = None) -> str | None:
    """What is wrong with the checkpoint, with the file's name; None where nothing is, or nothing was summed.

    Args:
      share, shares: which part of the files to look at, of how many parts.
      items: those alone, and what belongs to none; None: all.
    """
    sums, fault = _recorded(checkpoint)
    if fault:
        return fault
    wanted = (name for name in sums if items is None or "/" not in name or name.partition("/")[0] in items)
    names = sorted(wanted)[share::shares]

    def look(name: str) -> str | None:
        path = checkpoint / name
        if not path.exists():
            return f"{name} is gone"
        found, expected = _sum(path), sums[name]
        if found == expected:
            return None
        return f"{name} has {found[0]} bytes instead of {expected[0]}" if found[0] != expected[0] else f"{name} changed"

    with ThreadPoolExecutor(_THREADS) as pool:
        return next(filter(None, pool.map(look, names)), None)


def item_fingerprint(checkpoint: epath.Path, item: str) -> str:
    """sha256 (hex) over the names, sizes and checksums of an item's files; those that have no sum yet are summed."""
    recorded, _ = _recorded(checkpoint)
    files = [name for name in _files(checkpoint) if name.startswith(f"{item}/")]
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = list(pool.map(lambda name: recorded.get(name) or _sum(checkpoint / name), files))
    return hashlib.sha256(json.dumps([files, sums]).encode()).hexdigest()


def _recorded(checkpoint: epath.Path) -> tuple[dict[str, list[int]], str | None]:
    """file -> [bytes, crc32], as the processes wrote them, and what is wrong with that."""
    sums: dict[str, list[int]] = {}
    for file in sorted(checkpoint.glob("checksums.*.json")):
        try:
            sums |= json.loads(file.read_text())["crc32"]
        except (ValueError, KeyError, TypeError):
            return sums, f"{file.name} cannot be read"
    return sums, None


def _files(checkpoint: epath.Path) -> list[str]:
    found, left = [], [checkpoint]
    while left:
        for path in left.pop().iterdir():
            if path.is_dir():
                left.append(path)
            elif not re.match(r"\.?checksums\.", path.name):
                found.append(str(path.relative_to(checkpoint)))
    return sorted(found)


def _sum(path: epath.Path) -> list[int]:
    """[bytes, crc32]"""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]
