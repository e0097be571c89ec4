"""Rows and score stores in a bucket, on an S3 server of this machine's."""

import json
import os
from functools import partial

import numpy as np
import pytest

from lm_jax import storage
from lm_jax.data.rows import check_file_output, check_not_input, read_rows, replacing, write_jsonl
from lm_jax.data.score_store import ScoreStore
from lm_jax.errors import UserError
from tests import object_store

pytest.importorskip("s3fs", reason="pip install 'lm-jax[remote]'")
pytest.importorskip("moto", reason="moto[s3] and flask are the S3 server of the tests")

ROWS = [{"id": i, "text": "naïve\u2028text" * i} for i in range(5)]


@pytest.fixture(scope="module")
def server():
    with object_store.serve() as store:
        yield store


@pytest.fixture
def bucket(server, request):
    return server.make_bucket("b" + request.node.name.lower().replace("_", "-").replace("[", "-").rstrip("]")[:60])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Nothing may appear in the working directory, as a directory named `s3:`."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not [name for name in os.listdir(tmp_path) if ":" in name]


def line_of(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    line = str(error.value)
    assert "\n" not in line and object_store.SECRET not in line
    return line


def put(server, path, content):
    server.system().pipe_file(path, content)


def test_jsonl_comes_back_as_written(server, bucket):
    path = f"{bucket}/deep/down/rows.jsonl"
    write_jsonl(path, ROWS)
    assert read_rows(path, ("id",)) == ROWS
    written = server.system().cat_file(path).decode()
    assert [json.loads(line) for line in written.rstrip("\n").split("\n")] == ROWS
    write_jsonl(path, ROWS[:2])
    assert read_rows(path) == ROWS[:2]


def test_json_and_parquet_are_read(server, bucket, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    put(server, f"{bucket}/rows.json", json.dumps(ROWS).encode())
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    put(server, f"{bucket}/rows.parquet", (tmp_path / "rows.parquet").read_bytes())
    assert read_rows(f"{bucket}/rows.json") == ROWS
    assert read_rows(f"{bucket}/rows.parquet") == ROWS


def test_a_saved_dataset_is_read(server, bucket, tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "data")
    storage.upload(tmp_path / "data", os.listdir(tmp_path / "data"), f"{bucket}/data")
    assert read_rows(f"{bucket}/data") == ROWS


def test_what_fails_half_way_leaves_the_old_object(server, bucket):
    path = f"{bucket}/rows.jsonl"
    write_jsonl(path, ROWS)

    def half():
        with replacing(path) as out:
            out.write(b"{}\n" * 1000)
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError):
        half()
    assert read_rows(path) == ROWS
    assert server.names(bucket) == ["rows.jsonl"]


def test_faults_are_one_line(server, bucket):
    assert "no such file" in line_of(lambda: read_rows(f"{bucket}/absent.jsonl"))
    assert "no such" in line_of(lambda: read_rows("s3://no-such-bucket/rows.jsonl"))
    assert "no such bucket" in line_of(lambda: write_jsonl("s3://no-such-bucket/rows.jsonl", ROWS))
    assert "no bucket s3://no-such-bucket, or no access" in line_of(lambda: check_file_output("s3://no-such-bucket/rows.jsonl"))
    assert not server.system().exists("no-such-bucket")  # a mistyped name makes no bucket
    put(server, f"{bucket}/broken.jsonl", b'{"a": 1}\n{"a": \n')
    assert "broken.jsonl:2: broken JSON" in line_of(lambda: read_rows(f"{bucket}/broken.jsonl"))
    put(server, f"{bucket}/broken.parquet", b"PAR1")
    assert "no readable Parquet file" in line_of(lambda: read_rows(f"{bucket}/broken.parquet"))
    assert "is a directory" in line_of(lambda: check_file_output(bucket))
    assert "no bucket in it" in line_of(lambda: read_rows("s3:///rows.jsonl"))
    assert "gs://" in line_of(lambda: read_rows("ftp://host/rows.jsonl"))
    with server.refusing(lambda method, path: True):
        assert "no access" in line_of(lambda: read_rows(f"{bucket}/broken.jsonl"))
        assert "no access" in line_of(lambda: write_jsonl(f"{bucket}/new.jsonl", ROWS))
        assert "or no access" in line_of(lambda: check_file_output(f"{bucket}/new.jsonl"))


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(storage.PACKAGES, "s3", "no_such_library")
    assert "pip install 'lm-jax[remote]'" in line_of(lambda: read_rows("s3://bucket/rows.jsonl"))


def test_the_output_may_not_be_the_input(bucket):
    assert "itself" in line_of(lambda: check_not_input(f"{bucket}/rows.jsonl", f"{bucket}/rows.jsonl"))
    check_not_input(f"{bucket}/rows.jsonl", f"{bucket}/other.jsonl")


def create(path, key="k0"):
    return ScoreStore.create_or_open(path, {"data": key}, np.arange(40) % 7, ["a", "b"])


def values(store, rows, offset=0.0):
    return {f: [np.full(store.lengths[r], r + offset, np.float32) for r in rows] for f in store.fields}


def test_a_score_store_in_a_bucket(server, bucket):
    path = f"{bucket}/deep/weights"
    store = create(path)
    store.write([3, 1, 20], values(store, [3, 1, 20]))
    again = ScoreStore.open(path)
    for field, found in again.read([1, 3]).items():
        np.testing.assert_array_equal(np.concatenate(found), np.concatenate(values(store, [1, 3])[field]))
    assert set(np.flatnonzero(store.lengths)) - set(again.missing()) == {1, 3, 20}
    rest = again.missing()
    again.write(rest, values(again, rest))
    assert not create(path).missing().size
    assert "made for something else" in line_of(lambda: create(path, "k1"))
    assert "store.json" in server.names(path)


def test_two_writers_of_one_chunk_lose_nothing(bucket):
    """As two hosts do: each has read the chunk before the other wrote it."""
    first, second = create(f"{bucket}/w"), create(f"{bucket}/w")
    first.read([0]), second.read([0])
    first.write([1, 2], values(first, [1, 2]))
    second.write([3, 4], values(second, [3, 4]))
    first.write([5], values(first, [5]))
    assert set(np.flatnonzero(first.lengths)) - set(create(f"{bucket}/w").missing()) == {1, 2, 3, 4, 5}


def test_faults_of_a_store_are_one_line(server, bucket, monkeypatch):
    monkeypatch.setattr("lm_jax.data.score_store._RETRIES", 1)
    assert "no store there" in line_of(lambda: ScoreStore.open(f"{bucket}/absent"))
    assert "no-such-bucket" in line_of(lambda: create("s3://no-such-bucket/weights"))
    for address in ("ftp://host/weights", "s3://", "s3:///weights"):
        assert "give a local directory" in line_of(partial(create, address))
    with server.refusing(lambda method, path: True):
        assert "weights" in line_of(lambda: create(f"{bucket}/weights"))
