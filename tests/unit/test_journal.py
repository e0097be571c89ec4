"""The journal: every way a file can be cut, damaged, shared or filled up, and the bytes that come out in the end."""

import json
import os
import random
import resource
import subprocess
import sys

import numpy as np
import pytest

from lm_jax.data.journal import Journal, check_output, rows_fingerprint
from lm_jax.errors import UserError

N = 12
IDENTITY = {"config.seed": 3, "config.stop": ("a", 1), "input": "ab12"}


def value(row: int) -> dict:
    return {"response": f"ünï\u2028\n{row} " + "x" * (7 * row % 40), "p": row / 7}


ROWS = [{"id": i, "prompt": "p" * i} for i in range(N)]


def final() -> bytes:
    """What the output must be, without the journal's help."""
    return "".join(json.dumps(r | value(i), ensure_ascii=False) + "\n" for i, r in enumerate(ROWS)).encode()


def finish(output, order=None) -> bytes:
    """Goes on from what is there, in the order given, and ends the run."""
    with Journal(str(output), IDENTITY, N) as journal:
        missing = journal.missing().tolist()
        for row in [r for r in order or range(N) if r in missing]:
            journal.append([(row, value(row))])
        journal.finish(row | journal.value(i) for i, row in enumerate(ROWS))
    assert sorted(p.name for p in output.parent.iterdir()) == ["out.jsonl", "out.jsonl.run.json"]
    return output.read_bytes()


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.jsonl"


@pytest.fixture
def partial(output):
    return output.with_name("out.jsonl.partial")


@pytest.fixture
def run_file(output):
    return output.with_name("out.jsonl.run.json")


def begun(output, rows=(4, 0, 7)) -> list[int]:
    """A run that stopped after these rows, each appended by itself; the ends of their lines."""
    ends = []
    with Journal(str(output), IDENTITY, N) as journal:
        for row in rows:
            journal.append([(row, value(row))])
            ends.append(os.path.getsize(f"{output}.partial"))
    return ends


def test_an_undisturbed_run_in_any_order(tmp_path):
    for name, order in (("a", range(N)), ("b", random.Random(0).sample(range(N), N))):
        (tmp_path / name).mkdir()
        assert finish(tmp_path / name / "out.jsonl", list(order)) == final()


def test_cut_at_every_byte(output, partial):
    """A kill may leave any prefix of what was appended: the whole lines before the cut count, no other."""
    ends = begun(output)
    whole, settings = partial.read_bytes(), (output.parent / "out.jsonl.run.json").read_bytes()
    for cut in range(1, len(whole) + 1):
        output.unlink(missing_ok=True)
        (output.parent / "out.jsonl.run.json").write_bytes(settings)
        partial.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends)
        with Journal(str(output), IDENTITY, N) as journal:
            assert journal.damaged == 0
            assert set(range(N)) - set(journal.missing().tolist()) == set((4, 0, 7)[:kept])
            assert os.path.getsize(partial) == ([0, *ends][kept])
        if cut % 25 == 0:  # the lines after a cut are whole too
            assert finish(output) == final()


def test_every_flipped_bit_is_seen(output, partial):
    begun(output, (4, 0))
    whole = bytearray(partial.read_bytes())
    first = whole.index(b"\n") + 1
    for at in range(0, first):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            partial.write_bytes(damaged)
            with Journal(str(output), IDENTITY, N) as journal:
                assert journal.damaged >= 1
                # With its newline damaged the line takes the next one with it
                assert set(range(N)) - set(journal.missing().tolist()) == (set() if at == first - 1 else {0})
    assert finish(output) == final()


def test_damage_under_a_running_journal(output, partial):
    with Journal(str(output), IDENTITY, N) as journal:
        journal.append((i, value(i)) for i in range(N))
        damaged = bytearray(partial.read_bytes())
        damaged[50] ^= 4
        partial.write_bytes(damaged)
        with pytest.raises(UserError, match="row 0 is damaged on disk; run the same command again"):
            journal.finish(row | journal.value(i) for i, row in enumerate(ROWS))
    assert not output.exists()
    assert finish(output) == final()


def test_lists_and_what_may_not_be_appended(output):
    with Journal(str(output), IDENTITY, N) as journal:
        journal.append([(i, value(i)) for i in (5, 3)])
        for rows in ([(3, value(3))], [(1, value(1)), (1, value(1))]):
            with pytest.raises(ValueError, match="done already"):
                journal.append(rows)
        for bad, fault in (("\ud83d", "surrogate"), (float("nan"), "NaN"), (b"x", "bytes")):
            with pytest.raises(UserError, match=f"out.jsonl row 2: .*{fault}"):
                journal.append([(1, value(1)), (2, {"response": bad})])
        with pytest.raises(ValueError, match="10 rows are not done"):
            journal.finish([])
        with pytest.raises(ValueError, match="row 0 is not done"):
            journal.value(0)
        assert journal.missing().tolist() == [0, 1, 2, 4, 6, 7, 8, 9, 10, 11]
        assert journal.missing().dtype == np.int64
        assert journal.value(3) == value(3)
    assert finish(output) == final()


def test_a_value_that_is_to_be_done_again(output):
    failed = {"error": "no answer"}
    with Journal(str(output), IDENTITY, N) as journal:
        journal.append([(1, failed), (2, value(2))])
        assert journal.value(1) == failed  # within a run it counts
    with Journal(str(output), IDENTITY, N, redo=lambda v: "error" in v) as journal:
        assert 1 in journal.missing() and 2 not in journal.missing()
        journal.append([(1, value(1))])
    with Journal(str(output), IDENTITY, N, redo=lambda v: "error" in v) as journal:
        assert 1 not in journal.missing() and journal.value(1) == value(1)
    assert finish(output) == final()


def test_the_output_and_killed_around_its_appearance(output, partial, run_file, monkeypatch):
    begun(output, range(N))
    lines = partial.read_bytes()
    output.with_name(".out.jsonl.123.tmp").write_text("half")  # killed while it was written
    output.with_name(".out.jsonl.run.json.tmp").write_text("half")
    output.with_name(".out.jsonl.mine.tmp").write_text("mine")
    with Journal(str(output), IDENTITY, N) as journal:
        assert not journal.finished and not journal.missing().size
        journal.finish(row | journal.value(i) for i, row in enumerate(ROWS))
        assert journal.finished
    partial.write_bytes(lines)  # killed between the output and the end of .partial
    stat = output.stat()
    with Journal(str(output), IDENTITY, N) as journal:
        assert journal.finished and not journal.missing().size
    assert not partial.exists() and output.read_bytes() == final() and output.stat().st_mtime_ns == stat.st_mtime_ns
    assert sorted(p.name for p in output.parent.iterdir()) == [".out.jsonl.mine.tmp", "out.jsonl", "out.jsonl.run.json"]


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings(output, partial, finished):
    begun(output)
    if finished:
        finish(output)
    before = {p.name: p.read_bytes() for p in output.parent.iterdir()}
    with pytest.raises(UserError) as error:
        Journal(str(output), IDENTITY | {"config.stop": ["b"]}, N)
    assert 'config.stop=["a", 1], now ["b"]' in str(error.value) and "give another output" in str(error.value)
    with pytest.raises(UserError, match="config.new=null, now 1"):
        Journal(str(output), IDENTITY | {"config.new": 1}, N)
    with pytest.raises(UserError, match='input="ab12", now null'):
        Journal(str(output), {k: v for k, v in IDENTITY.items() if k != "input"}, N)
    assert before == {p.name: p.read_bytes() for p in output.parent.iterdir()}


def test_other_settings_where_nothing_is_done(output, partial):
    """A run of which every row failed may be corrected without deleting anything."""
    with Journal(str(output), IDENTITY | {"config.seed": 9}, N) as journal:
        journal.append([(1, {"error": "no answer"})])
    with pytest.raises(UserError, match="config.seed=9, now 3"):
        Journal(str(output), IDENTITY, N)
    with Journal(str(output), IDENTITY, N, redo=lambda v: "error" in v) as journal:
        assert journal.missing().size == N
    assert finish(output) == final()


def test_a_run_that_did_nothing_leaves_nothing(output):
    with Journal(str(output), IDENTITY, N):
        pass
    assert list(output.parent.iterdir()) == []


def test_killed_before_the_first_row(output, partial, run_file):
    begun(output, (1,))
    settings = run_file.read_bytes()
    for left in ({partial: b""}, {run_file: settings}, {partial: b"", run_file: settings}):
        for path in (partial, run_file, output):
            path.unlink(missing_ok=True)
        for path, content in left.items():
            path.write_bytes(content)
        assert finish(output) == final()


def test_files_of_somebody_else(output, partial, run_file):
    output.write_text("thesis")
    with pytest.raises(UserError, match="out.jsonl: there already, and no out.jsonl.run.json"):
        Journal(str(output), IDENTITY, N)
    run_file.write_text("{}")
    with pytest.raises(UserError, match="run.json: not the settings of a run"):
        Journal(str(output), IDENTITY, N)
    output.unlink()
    run_file.unlink()
    partial.write_text("notes\n")
    with pytest.raises(UserError, match="partial: there, but out.jsonl.run.json"):
        Journal(str(output), IDENTITY, N)
    assert partial.read_text() == "notes\n" and not run_file.exists()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("", "empty"),
        ("gs://bucket/out.jsonl", "local path"),
        ("directory.jsonl", "is a directory"),
        ("out.json", "ends in .jsonl"),
        ("busy.jsonl", "partial: is a directory"),
    ],
)
def test_outputs_that_cannot_be(tmp_path, name, part):
    (tmp_path / "directory.jsonl").mkdir()
    (tmp_path / "busy.jsonl.partial").mkdir()
    with pytest.raises(UserError, match=part):
        check_output(f"{tmp_path}/{name}" if name and "://" not in name else name)


def test_two_processes(output, partial):
    script = (
        "import sys; from lm_jax.data.journal import Journal\n"
        f"j = Journal({str(output)!r}, {IDENTITY!r}, {N})\n"
        "j.append([(3, {'response': 'other'})]); print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "ready\n"
        before = partial.read_bytes()
        with pytest.raises(UserError, match="out.jsonl.partial: another process is writing it"):
            Journal(str(output), IDENTITY, N)
        assert partial.read_bytes() == before
        other.kill()  # the lock goes with it
    with Journal(str(output), IDENTITY, N) as journal:
        assert journal.value(3) == {"response": "other"}


def test_a_lock_on_a_file_that_was_removed(output, partial, monkeypatch):
    """The one before ended between our opening of the file and our lock on it."""
    import fcntl

    flock, calls = fcntl.flock, []

    def late(descriptor, how):
        if not calls:
            partial.unlink()
        calls.append(descriptor)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with Journal(str(output), IDENTITY, N) as journal:
        assert len(calls) == 2
        journal.append([(2, value(2))])
        assert partial.exists()
    assert finish(output) == final()


def test_a_file_size_limit(output, partial):
    """EFBIG after a part of the block was written: the part goes, and the same journal goes on once there is room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(str(output), IDENTITY, N) as journal:
        journal.append([(0, value(0))])
        size = partial.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 150, before[1]))
        try:
            with pytest.raises(UserError, match="out.jsonl.partial: File too large; make room"):
                journal.append((i, value(i)) for i in range(1, N))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert partial.stat().st_size == size and journal.missing().size == N - 1
        journal.append([(1, value(1))])
    assert finish(output) == final()


@pytest.fixture
def small_disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "none", path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_full_disk(small_disk):
    output, ballast = small_disk / "out.jsonl", small_disk / "ballast"
    with Journal(str(output), IDENTITY, N) as journal:
        journal.append([(0, value(0))])
        ballast.write_bytes(b"x" * 20000)
        with pytest.raises(UserError, match="out.jsonl.partial: No space left on device; make room"):
            journal.append([(1, {"response": "y" * 50000})])
        ballast.unlink()
    with Journal(str(output), IDENTITY, N) as journal:
        assert journal.damaged == 0 and journal.missing().tolist() == [*range(1, N)]
        journal.append((i, value(i)) for i in range(1, N))
        with pytest.raises(UserError, match="out.jsonl: No space left on device; make room"):
            journal.finish((row | journal.value(i) | {"long": "x" * 5000}) for i, row in enumerate(ROWS))
        assert not output.exists()
    assert finish(output) == final()


def test_fingerprint_of_rows():
    rows = [{"a": 1, "b": "ü"}, {"a": 2}]
    other = [
        rows[::-1],
        [{"b": "ü", "a": 1}, {"a": 2}],
        [{"a": 1, "b": "u"}, {"a": 2}],
        [{"a": 1.0, "b": "ü"}, {"a": 2}],
    ]
    assert len({rows_fingerprint(r, "x") for r in (rows, *other)}) == 5
    assert rows_fingerprint(rows, "x") == rows_fingerprint([dict(r) for r in rows], "y")
    with pytest.raises(UserError, match="x.parquet row 1: .*bytes"):
        rows_fingerprint([{"a": 1}, {"a": b"1"}], "x.parquet")
