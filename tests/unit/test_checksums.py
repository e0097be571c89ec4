"""Which damage is found, and whose."""

import pytest
from etils import epath

from lm_jax.checkpoints.checksums import damage, write_checksums

FILES = ("params/d/0", "params/ocdbt.process_1/d/1", "optimizer/d/0", "progress/state", "_METADATA")


@pytest.fixture
def checkpoint(tmp_path):
    """Written by two processes."""
    root = epath.Path(tmp_path / "7")
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode() * 100)
    for process in (0, 1):
        write_checksums(root, process)
    return root


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_whole(checkpoint):
    assert damage(checkpoint) is None and damage(checkpoint, items={"params"}) is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("items", [None, {"params"}, {"optimizer", "progress"}])
def test_a_flipped_bit_is_named_where_it_is_looked_for(checkpoint, name, items):
    """What belongs to no item is always looked at."""
    flip(checkpoint / name)
    item = name.split("/")[0] if "/" in name else None
    expected = f"{name} changed" if items is None or item is None or item in items else None
    assert damage(checkpoint, items=items) == expected


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (lambda file: file.unlink(), "is gone"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "has 999 bytes instead of 1000"),
    ],
)
def test_a_file_that_is_gone_or_short(checkpoint, how, says):
    how(checkpoint / "params/d/0")
    assert damage(checkpoint, items={"params"}) == f"params/d/0 {says}"
    assert damage(checkpoint, items={"optimizer"}) is None


def test_parts_are_looked_at_once_each(checkpoint):
    """Of every number of parts one finds it."""
    flip(checkpoint / "params/d/0")
    for shares in (1, 2, 3, 7):
        found = [damage(checkpoint, share, shares, {"params"}) for share in range(shares)]
        assert [f for f in found if f] == ["params/d/0 changed"]


def test_checksums_that_cannot_be_read(checkpoint):
    (checkpoint / "checksums.1.json").write_text("{")
    assert damage(checkpoint, items={"optimizer"}) == "checksums.1.json cannot be read"
