"""Rows on a terminal: read back from the packed batch, every token in its place, nothing that steers the terminal."""

import io
import re

import numpy as np
import pytest

from lm_jax.data.packing import Segment
from lm_jax.data.tokenizers import load_tokenizer
from lm_jax.training.preview import as_trained, print_examples, segment_lines
from tests.checkpoints import make_tokenizer

CELL = re.compile(r"(\d+) +(\d+) +(?:(-?\d+\.\d+) )?(\S(?:.*?\S)??)(?: {2,}|$)")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path)
    return load_tokenizer(str(path))


def segment(tokenizer, prompt, response, weights=None):
    prompt, response = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, response))
    values = {"weights": np.linspace(0, 2, len(response)) if weights is None else weights(len(response))}
    return Segment(np.array(prompt, np.int32), np.array(response, np.int32), values)


def test_what_a_batch_holds_is_read_back(tokenizer):
    texts = (("the cat", "and the hat<|im_end|>"), ("what is this", "a<|im_end|>"))
    example = [segment(tokenizer, *pair) for pair in texts]
    for found, given in zip(as_trained(example, ("weights",)), example, strict=True):
        p, r = len(given.prompt), len(given.response)
        assert found["tokens"].tolist() == [*given.prompt, *given.response]
        assert found["positions"].tolist() == list(range(p + r))
        assert found["mask"].tolist() == [0] * p + [1] * r
        np.testing.assert_allclose(found["weights"], [*[0] * p, *given.values["weights"]], atol=1e-6)


def lines_of(tokenizer, one, full_length=None, width=100, colour=False):
    (found,) = as_trained([one], ("weights",))
    return segment_lines("chosen", found, full_length or len(one.response), tokenizer, ("weights",), width, colour)


@pytest.mark.parametrize("width", [20, 80, 200])
def test_every_token_is_printed_once_and_in_order(tokenizer, width):
    one = segment(tokenizer, "the cat and the hat, what is this and that", "user assistant system the hat<|im_end|>")
    lines = lines_of(tokenizer, one, width=width)
    assert lines[0] == f"chosen: {len(one.prompt)} tokens of prompt, {len(one.response)} of response"
    cells = [cell for line in lines if line.startswith("    ") for cell in CELL.findall(line.strip())]
    ids = [*one.prompt.tolist(), *one.response.tolist()]
    assert [int(position) for position, *_ in cells] == list(range(len(ids)))
    assert [int(token) for _, token, *_ in cells] == ids
    weights = [weight for _, _, weight, _ in cells]
    assert weights[: len(one.prompt)] == [""] * len(one.prompt)
    np.testing.assert_allclose([float(w) for w in weights[len(one.prompt) :]], one.values["weights"], atol=6e-4)
    kinds = [line.split()[0] for line in lines if line.startswith("  ") and not line.startswith("    ")]
    assert kinds == ["prompt", "response", "end"] and cells[-1][3] == "<|im_end|>"
    assert all(len(line) <= max(width, 40) for line in lines[2:] if line.startswith("    "))


def test_a_truncated_response_has_no_end(tokenizer):
    one = segment(tokenizer, "the cat", "and the hat")
    lines = lines_of(tokenizer, one, full_length=len(one.response) + 4)
    assert lines[-1].startswith(f"  truncated: 4 of {len(one.response) + 4} response tokens lie beyond max_length")
    assert not any(line.startswith("  end") for line in lines)


def test_signs_that_would_steer_the_terminal(tokenizer):
    one = segment(tokenizer, "a\x1b[31m", "b\r\x07 \u202e\u200b é日<|im_end|>")
    text = "\n".join(lines_of(tokenizer, one))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e\u200b]", text)
    for shown in (r"\x1b", r"\r", r"\x07", r"\u202e 1/3", r"\u200b 3/3", "é 2/2", "日 3/3", "␣"):
        assert shown in text


def test_colours_only_on_a_terminal(tokenizer, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    one = segment(tokenizer, "the cat", "and the hat<|im_end|>")
    given = [("f.jsonl row 3", [one], [("chosen", len(one.response))])]
    plain, coloured, quiet = io.StringIO(), Terminal(), Terminal()
    print_examples(given, tokenizer, ("weights",), plain)
    print_examples(given, tokenizer, ("weights",), coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    print_examples(given, tokenizer, ("weights",), quiet)
    assert "\033" not in plain.getvalue() and plain.getvalue() == quiet.getvalue()
    assert plain.getvalue().startswith("f.jsonl row 3\n")
    assert "\033[38;5;208m" in coloured.getvalue() and "\033[38;5;33m" in coloured.getvalue()
    unstyled = re.sub("\033\\[[\\d;]*m", "", coloured.getvalue())
    assert [line.rstrip() for line in unstyled.split("\n")] == plain.getvalue().split("\n")
