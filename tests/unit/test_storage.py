"""Rows and score stores in a bucket, on an S3 server of this machine's."""

import json
import os
import re
import shutil
from functools import partial

import numpy as np
import pytest
from etils import epath

from lm_jax.checkpoints import buckets as storage
from lm_jax.checkpoints import hf as hf_io
from lm_jax.checkpoints import mirror
from lm_jax.checkpoints.checksums import write_checksums
from lm_jax.checkpoints.directories import check_output
from lm_jax.checkpoints.runs import open_model
from lm_jax.data.rows import check_file_output, check_not_input, read_rows, replacing, write_jsonl
from lm_jax.data.score_store import ScoreStore
from lm_jax.errors import UserError
from tests import object_store
from tests.checkpoints import make_checkpoint, make_tokenizer

ROWS = [{"id": i, "text": "naïve\u2028text" * i} for i in range(5)]


@pytest.fixture(scope="module", params=["s3", "gs"])
def server(request):
    if request.param == "s3":
        pytest.importorskip("s3fs", reason="pip install -e '.[remote]'")
        pytest.importorskip("moto", reason="moto[s3] and flask are the S3 server of the tests")
    else:
        pytest.importorskip("gcsfs", reason="pip install -e '.[remote]'")
    with object_store.serve() if request.param == "s3" else object_store.serve_gcs() as store:
        yield store


@pytest.fixture
def bucket(server, request):
    return server.make_bucket(re.sub("[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:60])


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
    scheme = bucket.partition(":")[0]
    assert "no such file" in line_of(lambda: read_rows(f"{bucket}/absent.jsonl"))
    assert "no such" in line_of(lambda: read_rows(f"{scheme}://no-such-bucket/rows.jsonl"))
    assert "no such bucket" in line_of(lambda: write_jsonl(f"{scheme}://no-such-bucket/rows.jsonl", ROWS))
    assert f"no bucket {scheme}://no-such-bucket, or no access" in line_of(lambda: check_file_output(f"{scheme}://no-such-bucket/rows.jsonl"))
    assert not server.system().exists("no-such-bucket")  # a mistyped name makes no bucket
    put(server, f"{bucket}/broken.jsonl", b'{"a": 1}\n{"a": \n')
    assert "broken.jsonl:2: broken JSON" in line_of(lambda: read_rows(f"{bucket}/broken.jsonl"))
    put(server, f"{bucket}/broken.parquet", b"PAR1")
    assert "no readable Parquet file" in line_of(lambda: read_rows(f"{bucket}/broken.parquet"))
    assert "is a directory" in line_of(lambda: check_file_output(bucket))
    assert "no bucket in it" in line_of(lambda: read_rows(f"{scheme}:///rows.jsonl"))
    assert "gs://" in line_of(lambda: read_rows("ftp://host/rows.jsonl"))
    with server.refusing(lambda method, path: True):
        assert "no access" in line_of(lambda: read_rows(f"{bucket}/broken.jsonl"))
        assert "no access" in line_of(lambda: write_jsonl(f"{bucket}/new.jsonl", ROWS))
        assert "no access" in line_of(lambda: check_file_output(f"{bucket}/new.jsonl"))


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(storage.PACKAGES, "s3", "no_such_library")
    assert "pip install -e '.[remote]'" in line_of(lambda: read_rows("s3://bucket/rows.jsonl"))


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
    scheme = bucket.partition(":")[0]
    monkeypatch.setattr("lm_jax.data.score_store._RETRIES", 1)
    assert "no store there" in line_of(lambda: ScoreStore.open(f"{bucket}/absent"))
    assert "no-such-bucket" in line_of(lambda: create(f"{scheme}://no-such-bucket/weights"))
    for address in ("ftp://host/weights", f"{scheme}://", f"{scheme}:///weights"):
        assert "give a local directory" in line_of(partial(create, address))
    with server.refusing(lambda method, path: True):
        assert "weights" in line_of(lambda: create(f"{bucket}/weights"))


def checkpoint_of_two(run, step, save=b"first"):
    """As two processes leave it in the directory that both see."""
    root = run / "checkpoints" / str(step)
    shutil.rmtree(root, ignore_errors=True)
    for process in (0, 1):
        (root / f"params/ocdbt.process_{process}").mkdir(parents=True, exist_ok=True)
        (root / f"params/ocdbt.process_{process}/d").write_bytes(b"%d of %d" % (process, step))
    (root / "_CHECKPOINT_METADATA").write_bytes(save)
    for process in (0, 1):
        write_checksums(epath.Path(root), process)
    return root


def test_a_checkpoint_counts_once_every_process_has_copied_its_part(bucket, tmp_path):
    run, remote = tmp_path / "run", f"{bucket}/run"
    root = checkpoint_of_two(run, 3)
    (run / "metrics.jsonl").write_text('{"step": 3}\n')
    (run / "config.json").write_text("{}")
    (run / "model").mkdir()
    mirror.push_settings(remote, str(run))
    first, second = (mirror.Mirror(remote, str(run), 1, process, 2) for process in (0, 1))
    first.push(3)
    assert mirror.whole_steps(remote) == {}
    second.push(3)
    assert set(mirror.whole_steps(remote)) == {3}
    mirror.fetch(remote, str(tmp_path / "other"))
    other = tmp_path / "other/checkpoints/3"
    files = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
    assert files == sorted(str(p.relative_to(other)) for p in other.rglob("*") if p.is_file())
    assert all((root / f).read_bytes() == (other / f).read_bytes() for f in files)
    assert (tmp_path / "other/metrics.jsonl").read_text() == '{"step": 3}\n'
    # Saved once more, by processes that were killed and started again: parts of two saves make no checkpoint
    checkpoint_of_two(run, 3, b"again")
    second.push(3)
    assert mirror.whole_steps(remote) == {}
    first.push(3)
    checkpoint_of_two(run, 5)
    second.push(5), first.push(5)
    assert set(mirror.whole_steps(remote)) == {5}
    assert not [name for name in storage.find(f"{remote}/checkpoints") if name.startswith("3/")]


def test_the_newest_start_has_the_copy(bucket, tmp_path):
    checkpoint_of_two(tmp_path / "run", 1)
    old = mirror.Mirror(f"{bucket}/run", str(tmp_path / "run"), 1, 0, 1)
    old.push(1)
    mirror.Mirror(f"{bucket}/run", str(tmp_path / "elsewhere"), 1, 0, 1)
    assert "has taken it over" in line_of(lambda: old.push(2))


def test_a_copy_cannot_write_elsewhere(server, bucket, tmp_path):
    put(server, f"{bucket}/run/x", b"")
    assert "leads out" in line_of(lambda: storage.download(f"{bucket}/run", ["../../x"], tmp_path / "here"))


def test_an_export_in_a_bucket_is_whole_or_fails_to_load(server, bucket, tmp_path):
    make_checkpoint(tmp_path / "source", "llama")
    make_tokenizer(tmp_path / "source")
    source = open_model(str(tmp_path / "source"))
    params = hf_io.load_params(source.directory, source.config, None)

    def export(name):
        hf_io.export_hf(params, source.config, f"{bucket}/{name}", source.directory, "float32", 20_000)

    export("whole")
    if server.gcs is None:  # S3's requests have the name in their path
        puts = [path.rpartition("/")[2] for method, path in server.asked if method == "PUT" and "/whole/" in path]
    else:
        objects = server.gcs.buckets[bucket.removeprefix("gs://")]
        puts = [name.rpartition("/")[2] for name in sorted(objects, key=lambda name: objects[name][0])]
    assert puts[-1] == "config.json" and puts.count("model.safetensors.index.json") == 1
    assert "not empty" in line_of(lambda: export("whole"))
    asked = len(server.asked)

    def third(method, path):
        written = [m for m, _ in server.asked[asked:] if m in ("PUT", "POST")]
        return method in ("PUT", "POST") and len(written) >= 3 and "upload" in path + "upload" * (method == "PUT")

    with server.refusing(third):
        assert "no access" in line_of(lambda: export("failed"))
    assert server.names(f"{bucket}/failed") == []
    assert "no bucket" in line_of(lambda: check_output(f"{bucket}-not/model"))


def test_a_model_is_read_from_a_bucket_and_downloaded_once(server, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_checkpoint(tmp_path / "source", "llama")
    make_tokenizer(tmp_path / "source")
    (tmp_path / "source/pytorch_model.bin").write_bytes(b"not to be touched")
    storage.upload(tmp_path / "source", os.listdir(tmp_path / "source"), f"{bucket}/model")
    local, there = open_model(str(tmp_path / "source")), open_model(f"{bucket}/model")
    assert there.fingerprint == local.fingerprint
    assert not list((tmp_path / "cache").rglob("*.bin"))
    asked = len(server.asked)
    assert open_model(f"{bucket}/model") == there
    assert not [path for method, path in server.asked[asked:] if method == "GET" and path.endswith(".safetensors")]
    make_checkpoint(tmp_path / "source", "llama", seed=1)
    storage.upload(tmp_path / "source", ["model.safetensors"], f"{bucket}/model")
    assert open_model(f"{bucket}/model").fingerprint == open_model(str(tmp_path / "source")).fingerprint
    assert "no config.json there" in line_of(lambda: open_model(f"{bucket}/absent"))
    assert "gs://" in line_of(lambda: open_model("ftp://host/model"))
