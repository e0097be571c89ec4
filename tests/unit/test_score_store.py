"""The score store: rows come back as written, survive kills and many writers, and never serve another key."""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lm_jax.data import score_store
from lm_jax.data.score_store import ScoreStore
from lm_jax.errors import UserError

REPOSITORY = Path(__file__).parents[2]
KEY = {"data": "d0", "model": "m0", "tokenizer": "t0", "max_length": 64, "dtype": "float32"}
FIELDS = ("logprob", "entropy")


def lengths_of(rows):
    return np.arange(rows) * 7 % 23  # some rows have no tokens


def values_of(row, field, length):
    return np.arange(length, dtype=np.float32) + np.float32(1000 * row + (0.5 if field == "entropy" else 0))


def create(path, rows=50, key=KEY):
    return ScoreStore.create_or_open(str(path), key, lengths_of(rows), FIELDS)


def write(store, rows):
    store.write(rows, {f: [values_of(r, f, store.lengths[r]) for r in rows] for f in FIELDS})


def assert_right(store, rows):
    found = store.read(rows)
    for field in FIELDS:
        for row, values in zip(rows, found[field], strict=True):
            assert values.dtype == np.float32
            np.testing.assert_array_equal(values, values_of(row, field, store.lengths[row]))


@pytest.fixture(params=[score_store._CHUNK, 8], ids=["one_chunk", "rows_cross_chunks"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(score_store, "_CHUNK", request.param)
    monkeypatch.setattr(score_store, "_SCAN", request.param)


def test_rows_come_back_in_the_order_asked_for(tmp_path, chunk):
    store = create(tmp_path)
    empty = np.flatnonzero(store.lengths == 0)
    with_tokens = np.flatnonzero(store.lengths)
    np.testing.assert_array_equal(store.missing(), with_tokens)
    assert len(empty) > 1
    order = np.random.default_rng(0).permutation(50)
    write(store, order[:20])
    write(store, order[20:21])
    write(store, [])
    done = sorted({*order[:21], *empty})
    np.testing.assert_array_equal(store.missing(), np.setdiff1d(np.arange(50), done))
    assert_right(store, order[:21])
    assert_right(store, [done[3], done[3], done[0]])
    write(store, order[21:])
    assert store.missing().size == 0
    again = ScoreStore.open(str(tmp_path))
    assert (again.key, again.fields) == (KEY, ("entropy", "logprob"))
    np.testing.assert_array_equal(again.lengths, lengths_of(50))
    assert_right(again, order)
    assert_right(create(tmp_path), order)
    assert store.read([]) == {"logprob": [], "entropy": []}


def test_a_reader_sees_rows_as_they_are_written(tmp_path):
    writer, reader = create(tmp_path), create(tmp_path)
    for row in range(1, 5):
        with pytest.raises(UserError):
            reader.read([row])
        write(writer, [row])
        assert_right(reader, [row])


def test_rows_that_are_not_done_are_named(tmp_path, chunk):
    store = create(tmp_path)
    write(store, [4, 6])
    with pytest.raises(UserError) as caught:
        store.read([6, 5, 4, 7])
    assert f"score store {tmp_path}: row 5 has no values yet (2 of the 4 rows" in str(caught.value)
    assert "run the scoring to its end" in str(caught.value)


def test_a_damaged_chunk_is_named(tmp_path):
    store = create(tmp_path)
    write(store, [1])
    next(tmp_path.glob("*/entropy")).joinpath("c", "0").write_bytes(b"damaged")
    for use in (store.missing, lambda: store.read([1]), lambda: write(store, [2])):
        with pytest.raises(UserError, match=f"score store {tmp_path}: .*; check the path"):
            use()


def test_what_a_killed_writer_left_is_not_written_into(tmp_path):
    """A chunk is written into its lock file: of one that is longer the tail would stay."""
    create(tmp_path)
    for field in FIELDS:
        left = next(tmp_path.glob(f"*/{field}")) / "c"
        left.mkdir()
        (left / "0.__lock").write_bytes(b"x" * 100_000)
    store = create(tmp_path)
    write(store, [1, 2])
    assert_right(create(tmp_path), [1, 2])


def test_a_lock_that_is_held_stays(tmp_path):
    create(tmp_path)
    held = tmp_path / "chunk.__lock"
    with held.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        create(tmp_path)
        assert held.exists()


def test_half_a_row_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(score_store, "_CHUNK", 4)
    store = create(tmp_path)
    write(store, list(range(50)))
    first = store._offsets[3] // 4 + 1  # the second of the chunks that hold row 3
    next(tmp_path.glob("*/entropy")).joinpath("c", str(first)).unlink()
    assert 3 in store.missing()
    with pytest.raises(UserError, match="row 3 has no values"):
        store.read([3])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_named_and_nothing_is_written(tmp_path, bad):
    store = create(tmp_path)
    values = {f: [values_of(r, f, store.lengths[r]) for r in (1, 2)] for f in FIELDS}
    values["entropy"][1][3] = bad
    with pytest.raises(UserError, match=rf"row 2: entropy is {bad} at token 3; look at the row"):
        store.write([1, 2], values)
    assert {1, 2} <= set(store.missing())


def test_a_row_of_another_length_is_named(tmp_path):
    store = create(tmp_path)
    with pytest.raises(UserError, match=r"row 2: entropy has shape \(3,\) but the row has 14 tokens; score it with"):
        store.write([2], {"entropy": [np.zeros(3)], "logprob": [np.zeros(14)]})


@pytest.mark.parametrize(
    ("key", "lengths", "fields", "says"),
    [
        (KEY | {"model": "m1"}, lengths_of(50), FIELDS, 'something else: model was "m0" and is now "m1"'),
        (KEY | {"lora": 8}, lengths_of(50), FIELDS, "something else: lora was null and is now 8"),
        (KEY, lengths_of(49), FIELDS, "has 50 rows, the data 49"),
        (KEY, lengths_of(50) + (np.arange(50) == 17), FIELDS, r"row 17 has 4 tokens there and 5 now \(1 rows differ\)"),
        (KEY, lengths_of(50), ("logprob",), r"holds \['entropy', 'logprob'\], not \['logprob'\]"),
    ],
)
def test_a_store_for_something_else_is_refused(tmp_path, key, lengths, fields, says):
    write(create(tmp_path), [1])
    with pytest.raises(UserError, match=f"score store {tmp_path}.*{says}.*; delete it or give another path"):
        ScoreStore.create_or_open(str(tmp_path), key, lengths, fields)
    assert_right(create(tmp_path), [1])


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(UserError, match="no store there .*check the path"):
        ScoreStore.open(str(tmp_path / "absent"))
    (tmp_path / "store.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="not of a score store of this version; give another path"):
        create(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory.*; check the path, its access") as caught:
        create(tmp_path / "file")
    assert "tensorstore_spec" not in str(caught.value)


def test_a_creation_that_was_cut_short_is_no_store_and_is_made_anew(tmp_path):
    create(tmp_path, rows=30, key=KEY | {"data": "older"})
    (tmp_path / "store.json").unlink()
    with pytest.raises(UserError, match="no store there"):
        ScoreStore.open(str(tmp_path))
    store = create(tmp_path)
    write(store, [1, 2])
    assert_right(store, [1, 2])
    (tmp_path / "store.json").unlink()  # the same creation, cut short after its arrays were made, is taken up
    assert_right(create(tmp_path), [1, 2])


def test_of_two_creators_at_once_the_later_sees_the_other(tmp_path, monkeypatch):
    make, rival = score_store._array, KEY | {"model": "rival"}

    def rival_comes_first(*args):
        monkeypatch.setattr(score_store, "_array", make)
        write(create(tmp_path, key=rival), [1])
        return make(*args)

    monkeypatch.setattr(score_store, "_array", rival_comes_first)
    with pytest.raises(UserError, match='model was "rival" and is now "m0"'):
        create(tmp_path)
    assert_right(create(tmp_path, key=rival), [1])


def test_an_empty_store(tmp_path):
    store = ScoreStore.create_or_open(str(tmp_path), KEY, [], FIELDS)
    assert store.missing().size == 0 and store.read([])["entropy"] == []


def test_misuse_is_refused(tmp_path):
    store = create(tmp_path)
    for rows, values in (
        ([50], {f: [np.zeros(4)] for f in FIELDS}),
        ([-1], {f: [np.zeros(4)] for f in FIELDS}),
        ([1, 1], {f: [np.zeros(7)] * 2 for f in FIELDS}),
        ([1], {"logprob": [np.zeros(7)]}),
        ([1], {f: [] for f in FIELDS}),
    ):
        with pytest.raises(ValueError):
            store.write(rows, values)
    with pytest.raises(ValueError):
        ScoreStore.create_or_open(str(tmp_path), KEY, [1], ["../up"])


# A process that writes its share of the rows, a few a call, in an order of its own. It prints a line after each call.
WRITER = """
import sys
import numpy as np
from lm_jax.data import score_store
from tests.unit import test_score_store as t
path, share, shares, rows, chunk = sys.argv[1], *map(int, sys.argv[2:])
score_store._CHUNK = chunk
store = t.create(path, rows)
todo = np.array([r for r in store.missing() if r % shares == share], int)
for batch in np.array_split(np.random.default_rng(share).permutation(todo), max(1, len(todo) // 3)):
    t.write(store, batch)
    print(*batch, flush=True)
"""


def start_writer(path, share, shares, rows, chunk):
    arguments = [sys.executable, "-c", WRITER, *map(str, (path, share, shares, rows, chunk))]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(arguments, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("chunk", [1 << 16, 16])
def test_many_processes_write_interleaved_rows(tmp_path, chunk):
    rows, shares = 240, 4
    processes = [start_writer(tmp_path, share, shares, rows, chunk) for share in range(shares)]
    for process in processes:
        process.communicate(timeout=600)
        assert process.returncode == 0
    store = create(tmp_path, rows)  # every process created it; all of them agreed
    assert store.missing().size == 0
    assert_right(store, range(rows))


def test_killed_at_any_moment_and_resumed(tmp_path):
    rows, chunk = 1500, 16
    rng = np.random.default_rng(0)
    kills, partial = 0, 0
    while kills < 8:
        process = start_writer(tmp_path, 0, 1, rows, chunk)
        told = [process.stdout.readline()] if kills % 4 else []  # at times in the midst of starting or creating
        time.sleep(rng.uniform(0.0, 0.15))
        process.kill()
        told += process.communicate()[0].splitlines()
        kills += 1
        if not (tmp_path / "store.json").exists():
            continue
        store = create(tmp_path, rows)
        missing = set(store.missing())
        done = [r for r in range(rows) if r not in missing]
        assert_right(store, done)
        # The last line may itself be cut
        reported = {int(r) for line in told[:-1] for r in line.split()}
        assert reported <= set(done)
        partial += 0 < len(missing) < (store.lengths > 0).sum()
    assert partial >= 3  # else the kills came too early or too late to show anything
    process = start_writer(tmp_path, 0, 1, rows, chunk)
    process.communicate(timeout=600)
    assert process.returncode == 0
    store = create(tmp_path, rows)
    assert store.missing().size == 0
    assert_right(store, range(rows))


def test_the_arrays_are_plain_zarr(tmp_path):
    create(tmp_path)
    meta = json.loads((tmp_path / "store.json").read_text())
    array = json.loads((tmp_path / meta["data"] / "logprob" / "zarr.json").read_text())
    assert (array["zarr_format"], array["data_type"], array["shape"]) == (3, "float32", [int(lengths_of(50).sum())])


def test_addresses_of_buckets():
    assert score_store._kvstore("gs://b/runs/x/", "d/") == {"driver": "gcs", "bucket": "b", "path": "runs/x/d/"}
    assert score_store._kvstore("gs://b", "d/") == {"driver": "gcs", "bucket": "b", "path": "d/"}
    assert score_store._kvstore("gs://b/x") == {"driver": "gcs", "bucket": "b", "path": "x/"}
    with pytest.raises(UserError, match="score store ftp://b/x: give a local directory, gs://"):
        create("ftp://b/x")


def test_s3_is_told_what_it_does_not_read_by_itself(monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name, raising=False)
    spec = score_store._kvstore("s3://b/x", "d/")
    assert [spec.pop(name) for name in ("driver", "bucket", "path")] == ["s3", "b", "x/d/"]
    assert set(spec) == {"s3_request_retries"}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://host")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    found = score_store._kvstore("s3://b/x")
    assert (found["endpoint"], found["aws_region"]) == ("http://host", "eu-west-1")
    assert found["aws_credentials"] == {"type": "environment"}
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://other")
    assert score_store._kvstore("s3://b/x")["endpoint"] == "http://other"
