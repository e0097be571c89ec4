"""Reading and writing rows: every format gives the same rows, every fault its place and its cure."""

import tracemalloc

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lm_jax.data.rows import read_rows, stream_rows, write_jsonl
from lm_jax.errors import UserError

ROWS = [{"id": 7, "prompt": "grüße\u2028", "m": [{"role": "user", "content": "a"}]}, {"id": 8, "prompt": "", "m": []}]


def raised(path, columns=()):
    with pytest.raises(UserError) as caught:
        read_rows(str(path), columns)
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text
    return text.removeprefix(str(path))


def write(tmp_path, content, name="rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_every_format_gives_the_same_rows(tmp_path):
    write_jsonl(str(tmp_path / "a.jsonl"), ROWS)
    lines = (tmp_path / "a.jsonl").read_text().split("\n")
    write(tmp_path, f"[{lines[0]},\n{lines[1]}]", "a.json")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved.select([1]), "test": saved}).save_to_disk(tmp_path / "two")
    for name in ("a.jsonl", "a.json", "a.parquet", "saved", "one", "one:train", "two:test"):
        assert read_rows(str(tmp_path / name), ["id", "prompt"]) == ROWS, name


def test_rows_come_before_the_file_is_read_to_its_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' * 100_000 + "{broken")
    rows = stream_rows(str(path), ["a"])
    assert [next(rows) for _ in range(3)] == [{"a": 1}] * 3
    with pytest.raises(UserError, match="a.jsonl:100001: broken JSON at column 2"):
        list(rows)
    tracemalloc.start()
    try:
        path.write_text('{"a": 1}\n' * 100_000)
        assert sum(1 for _ in stream_rows(str(path))) == 100_000
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


def test_splits_have_to_be_there_and_chosen(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "two")
    two = tmp_path / "two"
    assert f"has the splits train, test; give {two}:SPLIT" in raised(two)
    assert "no split 'dev'; it has train, test" in raised(f"{two}:dev")
    assert "has no splits; give" in raised(f"{tmp_path / 'saved'}:train")
    (tmp_path / "plain").mkdir()
    assert "save_to_disk" in raised(tmp_path / "plain")
    assert "a file has no split 'train'" in raised(f"{write(tmp_path, '{}')}:train")


def test_hub_ids(monkeypatch):
    asked = []

    def load(name):
        asked.append(name)
        if name == "org/absent":
            raise FileNotFoundError("Dataset 'org/absent' doesn't exist on the Hub\nmore")
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows("org/pairs-v1.5") == ROWS == read_rows("org/pairs-v1.5:train")
    assert "doesn't exist on the Hub); check the path, or the name and the network" in raised("org/absent")
    assert asked == ["org/pairs-v1.5", "org/pairs-v1.5", "org/absent"]
    raised("org/rows.csv")
    raised("org/rows.jsonl")
    assert len(asked) == 3


def test_byte_order_mark_and_blank_lines(tmp_path):
    path = write(tmp_path, b'\xef\xbb\xbf{"id": 1}\r\n{"id": 2}\n\n  \n')
    assert read_rows(str(path), ["id"]) == [{"id": 1}, {"id": 2}]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", ": the file is empty; give a file with at least one row"),
        ("\n \n", ": the file is empty; give"),
        ('{"a": 1}\n\n{"a": }\n', ":3: broken JSON at column 7: Expecting value; mend the line"),
        ('{"a": 1}\n{"a": "NaN", "b": NaN}', ":2: NaN is no JSON number; write null"),
        ('{"a": -Infinity}', ":1: -Infinity is no JSON number; write null"),
        ('{"a": 1}\n[1]\n', " row 1: expected an object, got list; mend the row"),
        (b'{"a": 1}\n{"a": "\xff"}\n', ":2: not UTF-8 (byte 16); convert"),
        ("[" * 100000, ":1: JSON nested too deeply; flatten"),
    ],
)
def test_broken_lines_are_named(tmp_path, content, says):
    assert raised(write(tmp_path, content)).startswith(says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", ": no rows in it; give a file with at least one"),
        ('{"a": 1}', ": expected a list of rows, got dict; one object a line is .jsonl"),
        ('[{"a": 1},\n {"a" 1}]', ":2: broken JSON at column 7: Expecting ':' delimiter; mend"),
        ('[{"a": "NaN"},\n\n {"a": NaN}]', ":3: NaN is no JSON number"),
    ],
)
def test_broken_json_files_are_named(tmp_path, content, says):
    assert raised(write(tmp_path, content, "rows.json")).startswith(says)


def test_missing_things_are_named(tmp_path):
    path = write(tmp_path, '{"prompt": 1, "chosen": 2}\n{"chosen": 2, "promt": 1}')
    said = raised(path, ["prompt", "chosen"])
    assert said == " row 1: column 'prompt' is missing; it has chosen, promt; rename or add the column"
    assert "no such file; check the path" in raised(tmp_path / "absent.jsonl")
    assert "no such file or directory; give .jsonl, .json, .parquet" in raised(tmp_path / "absent")
    assert "unknown kind of file; give .jsonl" in raised(write(tmp_path, "a,b", "rows.csv"))
    assert "no readable Parquet file" in raised(write(tmp_path, "{}", "rows.parquet"))
    pq.write_table(pa.table({"a": []}), tmp_path / "none.parquet")
    assert "no rows in it" in raised(tmp_path / "none.parquet")


def test_written_lines_are_plain_utf8(tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    write_jsonl(str(path), ({"text": "grüße\n", "n": np.float32(0.5), "ids": np.arange(2)} for _ in range(2)))
    assert path.read_bytes() == '{"text": "grüße\\n", "n": 0.5, "ids": [0, 1]}\n'.encode() * 2
    assert [p.name for p in path.parent.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize(
    ("bad", "says"), [({"a": float("nan")}, "NaN or infinity is no JSON; remove"), ({"a": "\ud800"}, "surrogate")]
)
def test_a_failed_write_leaves_the_old_file(tmp_path, bad, says):
    path = tmp_path / "out.jsonl"
    write_jsonl(str(path), ROWS)
    with pytest.raises(UserError, match=f"out.jsonl row 1: .*{says}"):
        write_jsonl(str(path), [{"a": 1}, bad])
    assert read_rows(str(path)) == ROWS
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
