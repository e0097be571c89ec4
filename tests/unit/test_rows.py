"""Reading and writing rows: every format gives the same rows, every fault its place and its cure."""

import gzip
import json
import tracemalloc
import types

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lm_jax.data import formats
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


class Builder:
    """Of `datasets`, for a data set with the subsets en, de (splits train, test) or, where plain, with none."""

    def __init__(self, subset, splits):
        self.config = types.SimpleNamespace(name=subset or "default", data_files={s: [f"{s}.parquet"] for s in splits})


def test_hub_ids(monkeypatch):
    asked = []

    def builder(name, subset=None):
        if name == "org/absent":
            raise FileNotFoundError("Dataset 'org/absent' doesn't exist on the Hub\nmore")
        if name == "org/subsets" and subset is None:
            raise ValueError("Config name is missing.\nPick one among ['en', 'de']\nExample of usage:\n x")
        if subset not in (("en", "de") if name == "org/subsets" else (None,)):
            raise ValueError(f"BuilderConfig {subset!r} not found")
        return Builder(subset, ["train"] if subset == "de" or name == "org/pairs-v1.5" else ["train", "test"])

    def load(name, subset, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(datasets, "load_dataset", load)
    for path, subset, split in (
        ("org/pairs-v1.5", "default", "train"),
        ("org/pairs-v1.5:train", "default", "train"),
        ("org/both:test", "default", "test"),
        ("org/subsets:de", "de", "train"),
        ("org/subsets:en:test", "en", "test"),
    ):
        assert read_rows(path) == ROWS and asked.pop() == (path.split(":")[0], subset, split)
    for path, says in (
        ("org/both", "has the splits train, test; give org/both:SPLIT"),
        ("org/both:dev", "no split 'dev'; it has train, test"),
        ("org/subsets", "among ['en', 'de']; give org/subsets:SUBSET or org/subsets:SUBSET:SPLIT"),
        ("org/subsets:en", "has the splits train, test"),
        ("org/subsets:en:dev", "no split 'dev'; it has train, test"),
        ("org/absent", "doesn't exist on the Hub more); check the path, or the name and the network"),
        ("org/rows.csv", "no such file"),
        ("org/rows.jsonl", "no such file"),
        ("org/rows.txt", "no such file or directory"),
    ):
        with pytest.raises(UserError) as caught:
            read_rows(path)
        assert says in str(caught.value) and "\n" not in str(caught.value), caught.value
    assert not asked


def compressed(tmp_path, name, content):
    path = tmp_path / name
    with pa.CompressedOutputStream(str(path), pa.Codec.detect(name).name) as out:
        out.write(content)
    return path


def test_other_files_that_datasets_writes_and_people_have(tmp_path):
    lines = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)
    saved = datasets.Dataset.from_list(ROWS)
    saved.to_json(tmp_path / "by_datasets.json")  # JSON Lines
    write(tmp_path, json.dumps(ROWS, indent=2), "list.jsonl")
    write(tmp_path, lines, "a.ndjson")
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.json.bz2", "a.jsonl.lz4"):
        compressed(tmp_path, name, lines)
    compressed(tmp_path, "list.json.gz", json.dumps(ROWS).encode())
    names = [p.name for p in tmp_path.iterdir()]
    assert len(names) == 8
    for name in names:
        assert read_rows(str(tmp_path / name), ["id"]) == ROWS, name
    gz = tmp_path / "a.jsonl.gz"
    gz.write_bytes(gzip.compress(lines[:7]) + gzip.compress(lines[7:]))  # as appending to one leaves it
    assert read_rows(str(gz)) == ROWS


def test_tables_of_text(tmp_path):
    table = pd.DataFrame({"prompt": ['a, "b"\nc', "007"], "response": ["null", ""], "weight": [0.5, 1]})
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    compressed(tmp_path, "a.csv.gz", (tmp_path / "a.csv").read_bytes())
    expected = [
        {"prompt": 'a, "b"\nc', "response": "null", "weight": "0.5"},
        {"prompt": "007", "response": None, "weight": "1.0"},
    ]
    for name in ("a.csv", "a.tsv", "a.csv.gz"):
        assert read_rows(str(tmp_path / name)) == expected, name
    long = "x" * 200_000  # longer than the csv module takes by default
    assert read_rows(str(write(tmp_path, f"a,b\n{long},1\n\n", "b.csv"))) == [{"a": long, "b": "1"}]
    assert ":3: 3 cells where the first line names 2 columns" in raised(write(tmp_path, "a,b\n1,2\n1,2,3\n", "c.csv"))
    assert ":2: 1 cells where" in raised(write(tmp_path, "a,b\n1\n", "c.csv"))
    assert "broken CSV" in raised(write(tmp_path, 'a,b\n"1"x,2\n', "c.csv"))
    assert "column 'a' stands twice" in raised(write(tmp_path, "a,a\n1,2\n", "c.csv"))
    assert "the file is empty" in raised(write(tmp_path, "", "c.csv"))
    assert "no rows in it" in raised(write(tmp_path, "a,b\n", "c.csv"))


def test_damaged_compressed_files_are_named(tmp_path, monkeypatch):
    lines = b'{"a": "%d"}\n' * 500
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.jsonl.bz2"):
        path = compressed(tmp_path, name, lines)
        path.write_bytes(path.read_bytes()[:-6])
        assert "file (Truncated compressed stream); write it anew" in raised(path), name
    assert "no readable gzip file" in raised(write(tmp_path, lines, "b.jsonl.gz"))
    bomb = compressed(tmp_path, "c.jsonl.gz", b"\n" * 3_000_000)
    monkeypatch.setattr(formats, "_UNPACKED", 1 << 20)
    assert "over 100 times its size, as no real rows do" in raised(bomb)


def test_several_files(tmp_path):
    for name, row in (("b", 1), ("a", 0)):
        write(tmp_path, json.dumps({"n": row}), f"{name}.jsonl")
    (tmp_path / "notes.txt").write_text("no rows")
    both = [{"n": 0}, {"n": 1}]
    assert read_rows(str(tmp_path)) == read_rows(f"{tmp_path}/*.jsonl") == read_rows(f"{tmp_path}:train") == both
    assert read_rows(f"{tmp_path}/[b-c].*") == both[1:]
    assert "no files of rows there" in raised(f"{tmp_path}/x*.jsonl")
    write(tmp_path, '{"n": }', "c.jsonl")
    with pytest.raises(UserError, match="c.jsonl:1: broken JSON at column 7"):
        read_rows(str(tmp_path))
    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    for split, part, row in (("train", 0, 0), ("train", 1, 1), ("test", 0, 0)):
        pq.write_table(pa.Table.from_pylist([{"n": row}]), hub / f"{split}-0000{part}-of-00002.parquet")
    assert read_rows(f"{hub.parent}:train") == read_rows(f"{hub}/train-*.parquet") == both
    assert read_rows(f"{hub.parent}:test") == both[:1]
    assert f"has the splits train, test; give {hub.parent}:SPLIT" in raised(hub.parent)
    assert "no split 'dev'; it has train, test" in raised(f"{hub.parent}:dev")
    subsets = "".join(f"- config_name: {n}\n  data_files: data/{s}-*\n" for n, s in (("one", "train"), ("two", "test")))
    (hub.parent / "README.md").write_text(f"---\nconfigs:\n{subsets}---\n")
    assert read_rows(f"{hub.parent}:one") == read_rows(f"{hub.parent}:one:train") == both
    assert f"give {hub.parent}:SUBSET or" in raised(hub.parent)


def test_columns_by_other_names(tmp_path):
    path = write(tmp_path, '{"q": "a", "best": "b", "chosen": "x", "history": 1}\n{"q": "c", "best": null}')
    columns = "prompt=q, chosen=best, history="
    expected = [{"prompt": "a", "chosen": "b"}, {"prompt": "c", "chosen": None}]
    assert read_rows(str(path), ["prompt"], columns) == expected
    with pytest.raises(UserError, match="chosen=bset, but no row has a column 'bset'; row 0 has best, chosen, history"):
        read_rows(str(path), renamed="chosen=bset")
    for wrong in ("prompt", "=q", "a=b,a=c"):
        with pytest.raises(UserError, match='give OURS=THEIRS,..., as "prompt=question,chosen=best"'):
            read_rows(str(path), renamed=wrong)


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
        ('{\n"a": 1}', ":1: broken JSON at column 2: Expecting property name enclosed in double quotes; a file is one"),
        ('[{"a": 1},\n {"a" 1}]', ":2: broken JSON at column 7: Expecting ':' delimiter; mend"),
        ('[{"a": "NaN"},\n\n {"a": NaN}]', ":3: NaN is no JSON number"),
    ],
)
def test_broken_json_files_are_named(tmp_path, content, says):
    assert raised(write(tmp_path, content, "rows.json")).startswith(says)


def test_missing_things_are_named(tmp_path):
    path = write(tmp_path, '{"prompt": 1, "chosen": 2}\n{"chosen": 2, "promt": 1}')
    said = raised(path, ["prompt", "chosen"])
    assert said.startswith(" row 1: column 'prompt' is missing; it has chosen, promt; add the column, or name yours: ")
    assert said.endswith('--config.columns="prompt=..."')
    assert "no such file; check the path" in raised(tmp_path / "absent.jsonl")
    assert "no such file or directory; give .jsonl, .ndjson, .json, .csv" in raised(tmp_path / "absent")
    assert "unknown kind of file; give .jsonl" in raised(write(tmp_path, "a,b", "rows.xls"))
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
