"""Data made to harm, or damaged on disk: a clear error or the same rows, and no file elsewhere."""

import json
import os
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from launch import cli
from lm_jax.checkpoints.hf import load_params
from lm_jax.data import formats, score_store
from lm_jax.data.journal import Journal
from lm_jax.data.rows import read_rows, write_jsonl
from lm_jax.data.score_store import ScoreStore
from lm_jax.errors import UserError
from lm_jax.evaluation import command as evaluate
from lm_jax.models.registry import read_model_config
from tests.checkpoints import make_checkpoint

ATTEMPTS = 20  # flips of a bit and cuts, each


@pytest.fixture
def rows(tmp_path):
    """rows(content, name): what is read of a file with that content."""

    def read(content: str | bytes, name: str = "rows.jsonl") -> list[dict]:
        (tmp_path / name).write_bytes(
            content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        )
        return read_rows(str(tmp_path / name))

    return read


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('{"a": 1}\n{"prompt": "x", "prompt": "y"}\n', [":2", "'prompt' stands twice"]),
        ('{"a": {"b": 1, "b": 1}}', [":1", "'b' stands twice"]),
        ("{" + "".join(f'"{i}": 0, ' for i in range(300_000)) + '"299999": 0}', [":1", "'299999' stands twice"]),
        ('{"a": ' + "9" * 5000 + "}", [":1", "digits"]),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", [":1", "nested too deeply"]),
        ('{"a": ' * 100_000, [":1", "nested too deeply"]),
        ('{"a": NaN}', [":1", "NaN"]),
        ('{"a": -Infinity}', [":1", "Infinity"]),
        (b'{"a": "\xff"}', [":1", "UTF-8"]),
        (b'{"a": "\xed\xa0\x80"}', [":1", "UTF-8"]),  # half a surrogate pair, as if it were a character
        (b'{"a": "b"}\x00', [":1", "broken JSON"]),
        (b"\xff\xfe{\x00}\x00", [":1", "UTF-8"]),
        ("true", ["row 0", "object"]),
        ('"text"', ["row 0", "object"]),
    ],
)
def test_lines(rows, content, parts):
    with pytest.raises(UserError) as error:
        rows(content)
    assert [] == [part for part in ("rows.jsonl", *parts) if part not in str(error.value)], error.value
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("content", [b'\xef\xbb\xbf{"a": "b"}\r\n\r\n{"a": "c"}\r\n', b'{"a": "b"}\n{"a": "c"}'])
def test_marks_and_line_ends_of_other_systems(rows, content):
    assert rows(content) == [{"a": "b"}, {"a": "c"}]


def test_a_line_without_end(rows, monkeypatch):
    monkeypatch.setattr(formats, "_LINE", 1 << 20)
    assert len(rows('{"a": "' + "x" * ((1 << 20) - 9) + '"}')) == 1  # just as long as is taken
    with pytest.raises(UserError, match=r"rows.jsonl:2: a line of more than 1 MiB"):
        rows('{"a": 1}\n{"a": "' + "x" * (1 << 20) + '"}')


@pytest.mark.parametrize("name", ["rows.jsonl.xz", "rows.zip", "rows.pkl", "rows"])
def test_other_files_are_not_opened(rows, name):
    with pytest.raises(UserError, match="unknown kind of file"):
        rows(b"\x1f\x8b" + bytes(100), name)


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_parquet_file_that_unpacks_to_no_end(tmp_path, monkeypatch, dictionary):
    """200 MB of a file of kilobytes; the text is there once for all rows, or packed."""
    monkeypatch.setattr(formats, "_UNPACKED", 50 << 20)
    path = tmp_path / "rows.parquet"
    table = pa.table({"prompt": ["a" * (1 << 20)] * 200})
    pq.write_table(table, path, compression="zstd", use_dictionary=dictionary, dictionary_pagesize_limit=1 << 30)
    assert path.stat().st_size < 100_000
    with pytest.raises(UserError, match=r"rows.parquet: unpacks to .* GB"):
        read_rows(str(path))


def test_real_rows_of_parquet_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "_UNPACKED", 1 << 10)
    made = [{"prompt": f"say {i} of {i * i}", "scores": [i / 7] * 5} for i in range(500)]
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "rows.parquet")
    assert read_rows(str(tmp_path / "rows.parquet")) == made


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["..", ".", "../..", "a/../../b", "/etc/passwd", "org/name", "./x"])
def test_results_stay_in_their_directory(tmp_path, name):
    config = type("Config", (), {"output": str(tmp_path / "out")})
    path = evaluate._path(config, name, name)
    assert os.path.realpath(path.parent.parent) == str(tmp_path / "out") and path.parent.name not in ("", ".", "..")


@pytest.mark.parametrize("field", ["../x", "/abs", "a/b", "", "é", "x\0"])
def test_fields_that_are_no_names(tmp_path, field):
    with pytest.raises(ValueError, match="letters, digits"):
        ScoreStore.create_or_open(str(tmp_path), {}, [1], [field])


@pytest.mark.parametrize(
    "change", [{"data": "../other"}, {"data": 3}, {"fields": ["../x"]}, {"fields": "x"}, {"fields": [3]}, {"key": []}]
)
def test_a_store_that_leads_elsewhere(tmp_path, change):
    make_store(tmp_path / "store")
    meta = tmp_path / "store" / "store.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | change))
    with pytest.raises(UserError, match="score store .* is not of a score store of this version"):
        ScoreStore.open(str(tmp_path / "store"))


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000])
def test_paths_that_are_none(path):
    with pytest.raises(UserError, match="score store"):
        ScoreStore.open(path)


# --- what an error line may hold -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("row 0: x\x1b[2J\x07y", r"row 0: x\x1b[2J\x07y"),
        ("a\nb\r\nerror: c", "a b error: c"),
        ("half \ud800", r"half \ud800"),
        ("turned \u202e back", r"turned \u202e back"),
        ("日本 é", "日本 é"),
    ],
)
def test_error_lines_move_no_cursor(line, shown):
    assert cli._printable(line) == shown
    cli._printable(line).encode()


def test_error_lines_hold_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    monkeypatch.setenv("A_KEY", "row")  # no secret: a word
    line = cli._printable("row 1: hf_0123456789 refused by https://me:pw@host/x, mail a@b")
    assert line == "row 1: <HF_TOKEN> refused by https://host/x, mail a@b"


def test_error_lines_have_an_end():
    line = cli._printable("row 3: " + "x" * 10**6 + "; drop the row")
    assert len(line) < 1000 and line.startswith("row 3: x") and line.endswith("x; drop the row")


# --- damage ----------------------------------------------------------------------------------------------------------


def damaged(raw: bytes, seed: int, kind: str) -> bytes:
    draw = random.Random(seed)
    if kind == "cut":
        return raw[: draw.randrange(len(raw))]
    at = draw.randrange(8 * len(raw))
    return raw[: at // 8] + bytes([raw[at // 8] ^ 1 << at % 8]) + raw[at // 8 + 1 :]


LENGTHS = np.random.default_rng(0).integers(1, 40, 60)
VALUES = {
    f: [np.random.default_rng(i).standard_normal(n) for i, n in enumerate(LENGTHS)] for f in ("logprob", "weight")
}


def make_store(path) -> None:
    ScoreStore.create_or_open(str(path), {"model": "m"}, LENGTHS, list(VALUES)).write(range(len(LENGTHS)), VALUES)


def read_store(path) -> None:
    """Whoever reads values has the right ones."""
    store = ScoreStore.create_or_open(str(path), {"model": "m"}, LENGTHS, list(VALUES))
    for field, values in store.read(range(len(LENGTHS))).items():
        for value, right in zip(values, VALUES[field], strict=True):
            np.testing.assert_array_equal(value, right.astype(np.float32))


@pytest.mark.parametrize("kind", ["flip", "cut"])
@pytest.mark.parametrize("pattern", ["*/logprob/c/*", "*/lengths/c/*", "*/weight/zarr.json", "store.json"])
def test_damaged_score_stores(tmp_path, kind, pattern):
    """Named, or without effect, as a changed digit of the chunks' size in store.json."""
    make_store(tmp_path)
    (file,) = tmp_path.glob(pattern)
    raw, found = file.read_bytes(), 0
    for seed in range(ATTEMPTS):
        file.write_bytes(damaged(raw, seed, kind))
        try:
            read_store(tmp_path)
        except UserError as error:
            assert "score store" in str(error)
            found += 1
    assert found == ATTEMPTS if "/c/" in pattern else found >= 0.8 * ATTEMPTS
    file.write_bytes(raw)
    read_store(tmp_path)


def test_a_store_of_before_there_were_checksums_is_read_and_written(tmp_path, monkeypatch):
    original = score_store.ts.open

    def without(spec, **options):
        for codecs in [spec["metadata"]["codecs"]] if "metadata" in spec else []:
            codecs[:] = [codec for codec in codecs if codec["name"] != "crc32c"]
        return original(spec, **options)

    monkeypatch.setattr(score_store.ts, "open", without)
    half = {field: values[:30] for field, values in VALUES.items()}
    ScoreStore.create_or_open(str(tmp_path), {"model": "m"}, LENGTHS, list(VALUES)).write(range(30), half)
    monkeypatch.undo()
    meta = json.loads((tmp_path / "store.json").read_text())
    del meta["checksum"]
    (tmp_path / "store.json").write_text(json.dumps(meta))
    assert "crc32c" not in next(tmp_path.glob("*/weight/zarr.json")).read_text()
    store = ScoreStore.create_or_open(str(tmp_path), {"model": "m"}, LENGTHS, list(VALUES))
    store.write(range(30, 60), {field: values[30:] for field, values in VALUES.items()})
    read_store(tmp_path)


@pytest.mark.parametrize("kind", ["flip", "cut"])
def test_damaged_journals(tmp_path, kind):
    """Rows that are damaged are done anew; the others are what they were."""
    output = str(tmp_path / "out.jsonl")
    with Journal(output, {"seed": 1}, 8) as journal:
        journal.append([(i, {"response": f"answer {i}"}) for i in range(8)])
    partial = tmp_path / "out.jsonl.partial"
    raw, run = partial.read_bytes(), (tmp_path / "out.jsonl.run.json").read_bytes()
    for seed in range(ATTEMPTS):
        partial.write_bytes(damaged(raw, seed, kind))
        (tmp_path / "out.jsonl.run.json").write_bytes(run)
        with Journal(output, {"seed": 1}, 8) as journal:
            missing = set(journal.missing())
            assert missing, seed
            for row in set(range(8)) - missing:
                assert journal.value(row) == {"response": f"answer {row}"}


@pytest.mark.parametrize("kind", ["flip", "cut"])
def test_damaged_rows(tmp_path, kind):
    """JSON Lines has no checksum. A cut line is seen; a flip that leaves JSON behind is another text, and changes what
    runs and stores record of their data."""
    path = tmp_path / "rows.jsonl"
    made = [{"id": f"row {i}", "prompt": "say it", "weight": 1.5} for i in range(8)]
    write_jsonl(str(path), made)
    raw, seen = path.read_bytes(), 0
    for seed in range(ATTEMPTS):
        path.write_bytes(damaged(raw, seed, kind))
        try:
            assert read_rows(str(path)) != made
        except UserError as error:
            assert "rows.jsonl" in str(error)
            seen += 1
    assert seen >= ATTEMPTS // 4


@pytest.mark.parametrize("kind", ["flip", "cut"])
@pytest.mark.parametrize("part", ["header", "numbers"])
def test_damaged_safetensors(tmp_path, kind, part):
    """The format has no checksum: of flips, those of the header are seen and those that make a NaN or infinity."""
    make_checkpoint(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    before = load_file(file)
    save_file(before, file)  # without the metadata, the one place of the header where any text is right
    raw = file.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    config = read_model_config(tmp_path)
    seen = 0
    for seed in range(ATTEMPTS):
        cut = raw[:header] if part == "header" else raw[header:]
        bad = damaged(cut, seed, kind)
        file.write_bytes(bad + raw[header:] if part == "header" else raw[:header] + bad)
        try:
            load_params(tmp_path, config, None)
        except UserError as error:
            assert str(tmp_path) in str(error)
            seen += 1
    assert seen == ATTEMPTS if kind == "cut" else part == "numbers" or seen >= 0.8 * ATTEMPTS, seen
