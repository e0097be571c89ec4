"""Three processes, played by threads, encode a share each: all get what one process encodes by itself."""

import contextlib
import itertools
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from lm_jax.data import shares
from lm_jax.data.text import TextEncoder
from lm_jax.errors import UserError
from tests.unit.test_text import CHATML, byte_level

PROCESSES = 3
OPENS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")  # each turn by itself then


class Processes:
    def __init__(self, monkeypatch):
        self.own = threading.local()
        self.meeting = threading.Barrier(PROCESSES)
        self.given = [None] * PROCESSES
        index = SimpleNamespace(process_count=lambda: PROCESSES, process_index=lambda: self.own.index)
        monkeypatch.setattr(shares, "jax", index)
        monkeypatch.setattr(shares.processes, "gather", self.gather)
        monkeypatch.setattr(shares.processes, "link", SimpleNamespace(worked=lambda: None))

    def gather(self, part, _):
        assert part.dtype == np.int32
        self.given[self.own.index] = part
        self.meeting.wait(30)
        found = list(self.given)
        with contextlib.suppress(threading.BrokenBarrierError):  # another has left with an error already
            self.meeting.wait(30)
        return found

    def run(self, call):
        found = [None] * PROCESSES

        def one(index):
            self.own.index = index
            try:
                found[index] = call()
            except UserError as error:
                self.meeting.abort()
                found[index] = str(error)
            except threading.BrokenBarrierError:
                found[index] = None

        threads = [threading.Thread(target=one, args=(i,)) for i in range(PROCESSES)]
        [t.start() for t in threads], [t.join() for t in threads]
        return found


@pytest.fixture
def encoder():
    return TextEncoder(byte_level(CHATML, eos="<|im_end|>"), 60)


def turn(role, text):
    return {"role": role, "content": text}


def rows(number):
    """Of every kind: text, truncated text, a conversation whose middle turn is not learnt."""
    talk = [turn("assistant", "the sea"), turn("user", "is it wide"), turn("assistant", "it is")]
    kinds = [("say it ", "blue"), ("say it", "wide " * 80), ([turn("user", "sea?")], talk)]
    chosen = [kinds[i % 3] for i in range(number)]
    return [p for p, _ in chosen], [r for _, r in chosen], [f"row {i}" for i in range(number)]


def same(a, b):
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    return a == b and type(a) is type(b)


@pytest.mark.parametrize("template", [CHATML, OPENS])
@pytest.mark.parametrize("number", [0, 1, 2, 3, 7, 20])
def test_all_get_all_rows(monkeypatch, encoder, number, template):
    monkeypatch.setattr(shares, "_BLOCK", 3)
    encoder._tokenizer.chat_template = template
    expected = encoder.encode_conversations(*rows(number))
    if number > 2:
        assert expected[1][0].truncated and len(expected[2]) == (1 if template is CHATML else 2)
        assert template is not CHATML or expected[2][0].loss_mask is not None
    processes = Processes(monkeypatch)
    for found in processes.run(lambda: shares.encode_conversations(encoder, *rows(number))):
        assert [len(examples) for examples in found] == [len(examples) for examples in expected]
        for a, b in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
            assert all(same(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True)), (a, b)
    expected = encoder.encode_many(*rows(number)) if template is CHATML else []
    for found in processes.run(lambda: shares.encode_rows(encoder, *rows(number)) if expected else []):
        for a, b in zip(found, expected, strict=True):
            assert all(same(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True)), (a, b)
    prompts, _, names = rows(number)
    expected = encoder.encode_prompts(prompts, names)
    for found in processes.run(lambda: shares.encode_prompts(encoder, prompts, names)):
        assert len(found) == number and all(map(same, found, expected))


def test_the_work_is_divided(monkeypatch, encoder):
    asked = []
    monkeypatch.setattr(encoder, "encode_many", lambda p, *_: asked.append(len(p)) or [])
    Processes(monkeypatch).run(lambda: shares.encode_rows(encoder, *rows(10)))
    assert sorted(asked) == [2, 4, 4]


def test_all_know_what_is_wrong_with_a_row_of_any(monkeypatch, encoder):
    prompts, responses, names = rows(9)
    responses[4], prompts[7], names[7] = "", "é" * 100, "Zeile é 7"
    expected = encoder.encode_many(prompts, responses, names)
    assert [i for i, row in enumerate(expected) if isinstance(row, UserError)] == [4, 7]
    processes = Processes(monkeypatch)
    for found in processes.run(lambda: shares.encode_rows(encoder, prompts, responses, names)):
        assert [str(found[i]) for i in (4, 7)] == [str(expected[i]) for i in (4, 7)]
        assert [isinstance(row, UserError) for row in found] == [i in (4, 7) for i in range(9)]
    for found in processes.run(lambda: shares.encode_prompts(encoder, prompts, names)):
        assert str(found[7]).startswith("Zeile é 7: the response is lost") and found[4].size


def test_processes_with_other_rows_are_told(monkeypatch, encoder):
    prompts, responses, names = rows(9)
    processes = Processes(monkeypatch)

    def encode():
        its = [*responses[:-1], "red"] if processes.own.index == 2 else responses
        return shares.encode_rows(encoder, prompts, its, names)

    assert all("process 2 reads other rows than process 0" in line for line in processes.run(encode))
