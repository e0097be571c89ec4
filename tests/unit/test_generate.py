"""`generate_rows` around a generator that is simple enough to foretell: columns, ids, failures, restarts."""

import hashlib
import json
import random
import time
from collections.abc import Callable

import pytest

from configs.generate import get_config
from lm_jax.config import from_config_dict
from lm_jax.errors import UserError
from lm_jax.generation.command import GenerateConfig, generate_rows
from lm_jax.generation.requests import Completion, Sample, SamplingConfig


def text(seed: int, row: str, sample: int) -> str:
    digest = hashlib.sha256(f"{seed} {row} {sample}".encode()).hexdigest()
    return f"ünï\n\u2028{row}.{sample}: {digest[: int(digest[0], 16)]}"


class Fake:
    """Answers in an order that differs from call to call, in lists of one to four.

    Args:
      seconds: to wait before each list.
      fails: (id, how many rows it has answered in its life) -> the row's error, or None.
      stop_after: rows of one call, then a UserError as a server that went away.
    """

    def __init__(self, seconds: float = 0.0, fails: Callable = lambda i, n: None, stop_after: int | None = None):
        self.seconds, self.fails, self.stop_after = seconds, fails, stop_after
        self.requests, self.closed = [], 0

    def generate(self, requests, sampling: SamplingConfig):
        try:
            left, here = random.sample(list(requests), len(requests)), 0
            while left:
                time.sleep(self.seconds)
                taken, left = left[: (n := random.randint(1, 4))], left[n:]
                yield [self.answer(request, sampling) for request in taken]
                here += len(taken)
                if self.stop_after is not None and here >= self.stop_after:
                    raise UserError("the server went away")
        finally:
            self.closed += 1

    def answer(self, request, sampling) -> Completion:
        self.requests.append(request)
        if not request.prompt:
            return Completion(request.id, (), f"row {request.id}: the prompt has no tokens")
        if error := self.fails(request.id, len(self.requests)):
            return Completion(request.id, (), error)
        texts = [text(sampling.seed, request.id, i) for i in range(sampling.num_samples)]
        return Completion(request.id, tuple(Sample(t, ("stop", "length")[len(t) % 2], 3) for t in texts))


@pytest.fixture
def generate(tmp_path, capsys):
    """generate(rows or a path, generator, **keys): the output's rows and the report."""

    def call(rows, generator=None, **keys):
        path = rows
        if isinstance(rows, list):
            path = tmp_path / "prompts.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = get_config()
        config.update({"input": str(path), "output": f"{tmp_path}/out/answers.jsonl", "seed": 5, **keys})
        generate_rows(from_config_dict(GenerateConfig, config.to_dict()), generator or Fake())
        report = json.loads(capsys.readouterr().out)
        return [json.loads(line) for line in open(report["output"], encoding="utf-8")], report

    return call


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out" / "answers.jsonl"


def prompts(number: int = 20) -> list[dict]:
    return [{"prompt": f"say {i}", "id": f"r{i}", "tags": ["ü", {"b": None}]} for i in range(number)]


def reason(t: str) -> str:
    return ("stop", "length")[len(t) % 2]


def test_one_sample(generate):
    rows = prompts()
    answers, report = generate(rows)
    expected = [text(5, row["id"], 0) for row in rows]
    assert answers == [r | {"response": t, "finish_reason": reason(t)} for r, t in zip(rows, expected, strict=True)]
    assert [list(a) for a in answers] == [["prompt", "id", "tags", "response", "finish_reason"]] * len(rows)
    assert report | {"seconds": 0} == report | {"rows": 20, "failed": 0, "tokens": 60, "seconds": 0}


def test_several_samples(generate):
    answers, report = generate(prompts(), num_samples=3)
    for row in answers:
        assert row["response"] == [text(5, row["id"], i) for i in range(3)]
        assert row["finish_reason"] == [reason(t) for t in row["response"]]
    assert report["tokens"] == 180


def test_ids_that_rows_lack(generate):
    """Made from the position; numbers stay numbers."""
    fake = Fake()
    answers, _ = generate([{"prompt": "a"}, {"prompt": "b", "id": None}, {"prompt": "c", "id": "x"}], fake)
    assert [row["id"] for row in answers] == [0, 1, "x"]
    assert {r.id for r in fake.requests} == {"0", "1", "x"}
    assert [row["response"] for row in answers] == [text(5, i, 0) for i in ("0", "1", "x")]


def test_what_the_generator_is_asked(generate):
    chat = [{"role": "user", "content": "what"}]
    fake = Fake()
    keys = {"max_new_tokens": 9, "temperature": 0.0, "top_k": 4, "top_p": 0.5, "min_p": 0.1, "stop": ("x", 3)}
    seen = []
    fake.generate = lambda requests, sampling, real=fake.generate: seen.append(sampling) or real(requests, sampling)
    generate([{"prompt": chat, "max_new_tokens": 9}, {"prompt": "b", "max_new_tokens": None}], fake, **keys)
    assert sorted((r.id, r.prompt, r.max_new_tokens) for r in fake.requests) == [("0", chat, 9), ("1", "b", None)]
    assert seen == [SamplingConfig(**keys, repetition_penalty=1.0, num_samples=1, seed=5)]


def test_formats(generate, tmp_path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = [{"id": i, "prompt": f"say {i}"} for i in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    expected, _ = generate(rows)
    for name in ("rows.parquet", "rows.json", "saved"):
        assert generate(tmp_path / name, output=f"{tmp_path}/{name}.jsonl")[0] == expected


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([{"prompt": "a"}, {"text": "b"}], "prompts.jsonl row 1: column 'prompt' is missing"),
        (
            [{"prompt": "a", "id": 3}, {"prompt": "b"}, {"prompt": "c", "id": "3"}],
            "row 2: has the same id '3' as row 0",
        ),
        ([{"prompt": "a", "id": 1}, {"prompt": "b"}], "row 1: has the same id 1 as row 0 .a row without one is called"),
        ([{"prompt": "a", "id": 1.5}], "row 0: id must be a string or a whole number, got 1.5"),
        ([{"prompt": "a", "id": True}], "row 0: id must be"),
        ([{"prompt": "a", "id": ""}], "row 0: id must be"),
        ([{"prompt": "a", "response": None}], "row 0: has a column 'response' already.* rename it"),
        ([{"prompt": "a", "finish_reason": "x"}], "row 0: has a column 'finish_reason' already"),
        ([{"prompt": "a", "error": 1}], "row 0: has a column 'error' already"),
        ([{"prompt": "a", "max_new_tokens": 513}], "row 0: max_new_tokens must be .*=512, got 513"),
        ([{"prompt": "a", "max_new_tokens": 0}], "row 0: max_new_tokens must be"),
        ([{"prompt": "a", "max_new_tokens": 3.0}], "row 0: max_new_tokens must be"),
        ([{"prompt": "a", "max_new_tokens": True}], "row 0: max_new_tokens must be"),
        ([{"prompt": "a", "x": "\ud83d"}], "prompts.jsonl row 0: half a surrogate pair"),
    ],
)
def test_rows_that_cannot_be(generate, output, rows, part):
    with pytest.raises(UserError, match=part):
        generate(rows)
    assert not output.parent.exists()


def test_a_value_that_json_lacks(generate, tmp_path):
    """Seen before anything is generated, not when the output is written."""
    import datetime

    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "a", "when": datetime.date(2020, 1, 1)}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="rows.parquet row 0: .*date.*drop the column"):
        generate(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"temperature": -1.0}, "config.temperature=-1.0"),
        ({"temperature": float("nan")}, "config.temperature=nan"),
        ({"top_p": 0.0}, "config.top_p=0.0"),
        ({"max_new_tokens": 0}, "config.max_new_tokens=0"),
        ({"num_samples": 0}, "config.num_samples=0"),
        ({"stop": ("",)}, "config.stop: an empty text"),
        ({"stop": (1.5,)}, r"config.stop\[0\]: expected str or int, got 1.5"),
        ({"max_failed_share": 1.5}, "config.max_failed_share=1.5"),
        ({"model": "x", "endpoint": {"url": "http://h/v1"}}, "config.model='x' and config.endpoint.url"),
        ({"output": ""}, "output: empty"),
        ({"output": "x.txt"}, "x.txt: .* ends in .jsonl"),
    ],
)
def test_settings_that_cannot_be(generate, keys, part):
    with pytest.raises(UserError, match=part):
        generate(prompts(), **keys)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"url": "localhost:8000"}, "config.endpoint.url: must be like http"),
        ({"url": "http://h/v1"}, "config.endpoint.model='': must be"),
        ({"url": "http://h/v1", "model": "m", "concurrency": 0}, "config.endpoint.concurrency=0"),
        ({"url": "http://h/v1", "model": "m", "timeout": -1.0}, "config.endpoint.timeout=-1.0"),
    ],
)
def test_endpoints_that_cannot_be(output, settings, part):
    pytest.importorskip("lm_jax.generation.endpoints")
    config = get_config()
    config.update({"input": "no.jsonl", "output": str(output), "endpoint": settings})
    with pytest.raises(UserError, match=part):
        generate_rows(from_config_dict(GenerateConfig, config.to_dict()))


def test_the_output_is_the_input(generate, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "prompts.jsonl")
    for name in ("prompts", "link"):
        with pytest.raises(UserError, match="jsonl: there already|the input itself"):
            generate(tmp_path / "prompts.jsonl", output=f"{tmp_path}/{name}.jsonl")
    assert (tmp_path / "prompts.jsonl").read_text() == '{"prompt": "a"}\n'


def test_rows_without_an_answer(generate, output):
    rows = [row | ({"prompt": ""} if i in (3, 11) else {}) for i, row in enumerate(prompts())]
    answers, report = generate(rows, max_failed_share=0.1)
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        t = text(5, row["id"], 0)
        fault = {"response": None, "finish_reason": "error", "error": f"row r{i}: the prompt has no tokens"}
        assert answer == row | (fault if i in (3, 11) else {"response": t, "finish_reason": reason(t)})
    assert report["failed"] == 2 and report["rows"] == 20
    assert generate(rows, max_failed_share=0.1)[1]["failed"] == 2  # a finished run knows it too


def test_too_many_without_an_answer(generate, output):
    """It stops as soon as that is certain; what was answered stays, and the cure that the line names works."""
    rows = [row | ({"prompt": ""} if i % 2 else {}) for i, row in enumerate(prompts(100))]
    fake = Fake(fails=lambda i, n: "something\nrare" if i == "r0" else None)
    with pytest.raises(UserError) as error:
        generate(rows, fake)
    line = str(error.value)
    assert "of 100 rows could not be answered" in line and "config.max_failed_share=0.05" in line
    assert "the prompt has no tokens" in line and "answers.jsonl.partial stay" in line and "\n" not in line
    assert len(fake.requests) < 40 and fake.closed == 1 and not output.exists()
    answered = {r.id for r in fake.requests if r.prompt and r.id != "r0"}
    again = Fake()
    answers, report = generate(rows, again, max_failed_share=0.5)
    assert report["failed"] == 50 and sum(a["response"] is None for a in answers) == 50
    assert not answered & {r.id for r in again.requests} and "r0" in {r.id for r in again.requests} | answered


def test_exactly_the_share_may_fail(generate, tmp_path):
    fails = lambda i, n: "no" if i == "r7" else None  # noqa: E731
    assert generate(prompts(), Fake(fails=fails), max_failed_share=0.05)[1]["failed"] == 1
    with pytest.raises(
        UserError, match=r"1 of 20 rows could not be answered \(5.0%, more .*=0.04\), 1 of them .*: no;"
    ):
        generate(prompts(), Fake(fails=fails), max_failed_share=0.04, output=f"{tmp_path}/other.jsonl")


def test_failed_rows_of_a_stopped_run_are_tried_again(generate, output):
    undisturbed, _ = generate(prompts())
    expected = output.read_bytes()
    for path in output.parent.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="the server went away"):
        generate(prompts(), Fake(fails=lambda i, n: "no" if n < 4 else None, stop_after=9), max_failed_share=0.5)
    fake = Fake()
    answers, report = generate(prompts(), fake, max_failed_share=0.5)
    assert answers == undisturbed and output.read_bytes() == expected and report["failed"] == 0
    assert 11 <= len(fake.requests) <= 14 and report["tokens"] == 3 * len(fake.requests)


def test_stopped_again_and_again(generate, output):
    generate(prompts(40), num_samples=2)
    expected = output.read_bytes()
    for path in output.parent.iterdir():
        path.unlink()
    asked = []
    for _ in range(100):
        fake = Fake(stop_after=3)
        try:
            generate(prompts(40), fake, num_samples=2)
            break
        except UserError as error:
            assert "went away" in str(error)
        finally:
            asked += [r.id for r in fake.requests]
    assert output.read_bytes() == expected
    assert sorted(asked) == sorted(r["id"] for r in prompts(40))  # no row was done twice


def test_a_finished_run(generate, output, capsys):
    generate(prompts())
    before = output.read_bytes(), output.stat().st_mtime_ns
    fake = Fake()
    _, report = generate(prompts(), fake)
    assert not fake.requests and report["rows"] == 20 and report["tokens"] == 0
    assert before == (output.read_bytes(), output.stat().st_mtime_ns)


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"temperature": 0.5}, "config.temperature=0.7, now 0.5"),
        ({"seed": 6}, "config.seed=5, now 6"),
        ({"stop": ("x",)}, r'config.stop=\[\], now \["x"\]'),
        ({"num_samples": 2}, "config.num_samples=1, now 2"),
        ({"endpoint": {"model": "other"}}, 'config.endpoint.model="", now "other"'),
    ],
)
def test_going_on_with_other_settings(generate, output, changed, part):
    with pytest.raises(UserError, match="went away"):
        generate(prompts(), Fake(stop_after=5))
    for _ in range(2):
        with pytest.raises(UserError, match=f"answers.jsonl.*: .* {part}; .*another output"):
            generate(prompts(), **changed)
        generate(prompts())  # now finished, and refused as well
    with pytest.raises(UserError, match="number of rows=20, now 21"):
        generate(prompts(21))
    with pytest.raises(UserError, match="fingerprint of config.input="):
        generate(prompts(19) + [{"prompt": "say 19", "id": "r19"}])


def test_what_may_change_between_a_run_and_its_continuation(generate, tmp_path):
    with pytest.raises(UserError, match="went away"):
        generate(prompts(), Fake(stop_after=5))
    (tmp_path / "prompts.jsonl").rename(tmp_path / "moved.jsonl")
    keys = {"max_failed_share": 0.2, "decode": {"slots": 3}, "mesh": {"data": 2}, "compute": {"scan_unroll": 3}}
    answers, _ = generate(tmp_path / "moved.jsonl", **keys)
    assert [row["response"] for row in answers] == [text(5, f"r{i}", 0) for i in range(20)]


def test_half_a_surrogate_pair_in_an_answer(generate):
    fake = Fake()
    real = fake.answer
    broken = Completion("r3", (Sample("\ud83d", "stop", 1),))
    fake.answer = lambda request, sampling: broken if request.id == "r3" else real(request, sampling)
    answers, report = generate(prompts(), fake)
    assert report["failed"] == 1 and "surrogate" in answers[3]["error"] and answers[3]["response"] is None


def test_an_answer_of_the_wrong_size(generate):
    fake = Fake()
    fake.answer = lambda request, sampling: Completion(request.id, ())
    with pytest.raises(ValueError, match="row r[0-9]+: 0 samples, 1 were asked for"):
        generate(prompts(), fake)


def test_damaged_lines_are_said(generate, output, capsys):
    with pytest.raises(UserError, match="went away"):
        generate(prompts(), Fake(stop_after=5))
    partial = output.with_name("answers.jsonl.partial")
    content = bytearray(partial.read_bytes())
    content[40] ^= 1
    partial.write_bytes(content)
    capsys.readouterr()
    config = get_config()
    config.update({"input": str(output.parent.parent / "prompts.jsonl"), "output": str(output), "seed": 5})
    generate_rows(from_config_dict(GenerateConfig, config.to_dict()), Fake())
    assert "answers.jsonl.partial: 1 damaged lines; their rows are done anew" in capsys.readouterr().err
    assert [json.loads(line)["response"] for line in output.open(encoding="utf-8")] == [
        text(5, f"r{i}", 0) for i in range(20)
    ]
