"""IFEval's scores from files: the published ones, verdicts checked by hand, and what is refused."""

import importlib.util
import json

import pytest

from lm_jax.errors import UserError
from lm_jax.evaluation import lm_eval_setup
from lm_jax.evaluation.command import IfevalConfig, evaluate_ifeval
from lm_jax.evaluation.ifeval import read_prompts, score_responses
from lm_jax.evaluation.responses import read_responses

# The paper's table (arXiv 2311.07911) for the GPT-4 responses that were released with it, in percent
PUBLISHED = {
    "prompt_level_strict_acc": 76.89,
    "inst_level_strict_acc": 83.57,
    "prompt_level_loose_acc": 79.30,
    "inst_level_loose_acc": 85.37,
}
LETTERS = {"letter": "!", "let_frequency": 3, "let_relation": "at least"}
WORDS = {"num_words": 4, "relation": "at least"}
COUNTED = ["length_constraints:number_words", "keywords:letter_frequency"]
# (prompt, instructions, their arguments)
ROWS = (
    ("Say it without commas.", ["punctuation:no_comma"], [{}]),
    ("Four words or more, three ! or more.", COUNTED, [WORDS, LETTERS]),
    ("End with the word end.", ["startend:end_checker"], [{"end_phrase": "the end"}]),
)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def prompts(tmp_path):
    """prompts(change): the rows above as a file, read; `change` works on the list of rows before."""

    def make(change=lambda rows: None):
        rows = [{"prompt": p, "instruction_id_list": i, "kwargs": k} for p, i, k in ROWS]
        change(rows)
        return read_prompts(write(tmp_path / "prompts.jsonl", rows))

    return make


@pytest.fixture
def responses(tmp_path, prompts):
    """responses(*rows): what `read_responses` makes of (prompt number or prompt, response) rows."""

    def read(*rows, allow_missing=False):
        named = [{"prompt": ROWS[p][0] if isinstance(p, int) else p, "response": r} for p, r in rows]
        return read_responses(write(tmp_path / "responses.jsonl", named), prompts(), allow_missing)

    return read


def test_the_published_scores(shared_data):
    prompts = read_prompts(str(shared_data / "ifeval_prompts.jsonl"))
    responses = read_responses(str(shared_data / "ifeval_responses_gpt4.jsonl"), prompts, False)
    assert responses.edited == (33, 339)  # prompts that were mended after the responses had been published
    scores = score_responses(prompts, responses.texts)
    for name, percent in PUBLISHED.items():
        assert 100 * scores[name] == pytest.approx(percent, abs=0.6), name
    assert (scores["num_prompts"], scores["num_instructions"], scores["num_missing"]) == (541, 834, 0)
    kinds = scores["instructions"].values()
    assert sum(kind["num"] for kind in kinds) == 834 and len(kinds) == 25
    for name in ("strict", "loose"):
        total = sum(kind["num"] * kind[f"{name}_acc"] for kind in kinds)
        assert total / 834 == pytest.approx(scores[f"inst_level_{name}_acc"])


def test_verdicts_by_hand(prompts, responses):
    """Of four instructions: followed; followed, not; not followed but for the asterisks around it."""
    found = responses((0, "No comma here."), (1, "One two three four!!"), (2, "This is the *end*"))
    scores = score_responses(prompts(), found.texts)
    assert scores["inst_level_strict_acc"] == 2 / 4 and scores["inst_level_loose_acc"] == 3 / 4
    assert scores["prompt_level_strict_acc"] == 1 / 3 and scores["prompt_level_loose_acc"] == 2 / 3
    assert scores["instructions"]["startend:end_checker"] == {"num": 1, "strict_acc": 0.0, "loose_acc": 1.0}
    assert scores["instructions"]["punctuation:no_comma"] == {"num": 1, "strict_acc": 1.0, "loose_acc": 1.0}


def test_the_character_asked_for_is_counted(prompts, responses):
    """lm-eval's checker counts a letter at random where a prompt asks for a `!`."""
    for text, met in (("Go on and on and on!!!", 1.0), ("Eeeee aaaaa ooooo iiiii uuuuu sssss ttttt!!", 0.0)):
        for _ in range(5):
            found = responses((0, "x"), (1, text), (2, "x"))
            scores = score_responses(prompts(), found.texts)["instructions"]["keywords:letter_frequency"]
            assert scores["strict_acc"] == met


def test_languages_are_told_alike_every_time():
    lm_eval_setup.prepare_ifeval()
    import langdetect

    # Without a seed every call gives other probabilities
    for text in ("no", "Das ist alles", "hello ok si"):
        assert len({str(langdetect.detect_langs(text)) for _ in range(20)}) == 1


def test_an_empty_response_follows_nothing_and_a_missing_one_is_left_out(prompts, responses):
    found = responses((0, ""), (2, "It is the end"), (1, None), allow_missing=True)
    scores = score_responses(prompts(), found.texts)
    assert scores["prompt_level_loose_acc"] == 1 / 2
    assert (scores["num_prompts"], scores["num_instructions"], scores["num_missing"]) == (2, 2, 1)


def test_a_prompt_may_be_messages(responses):
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": ROWS[1][0]}]
    assert responses((2, "c"), (chat, "b"), (0, "a")).texts == ("a", "b", "c")


def test_a_mended_prompt_is_found_in_its_row(responses):
    mended = ROWS[2][0].replace("word end.", "word end..")
    found = responses((0, "a"), (1, "b"), (mended, "c"))
    assert (found.texts, found.edited) == (("a", "b", "c"), (2,))
    with pytest.raises(UserError, match=r"row 0: its prompt .* is not in config.prompts"):
        responses((mended, "c"), (0, "a"), (1, "b"))  # of another row
    with pytest.raises(UserError, match=r"row 2: its prompt .* is not in config.prompts"):
        responses((0, "a"), (1, "b"), ("Write a poem.", "c"))  # not alike


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([(0, "a"), (2, "c")], ("1 of 3 prompts have no response", "prompts.jsonl row 1", "config.allow_missing=true")),
        ([(0, "a"), (1, None), (2, "c")], ("1 of 3 prompts have no response", "prompts.jsonl row 1")),
        ([(0, "a"), (1, "b"), (2, "c"), (1, "d")], ("responses.jsonl row 3", "same prompt as row 1", "keep one")),
        ([(0, "a"), (1, "b"), (2, "c"), ("x", "d")], ("responses.jsonl row 3", "'x'", "not in config.prompts")),
        ([(0, "a"), (1, ["b"]), (2, "c")], ("responses.jsonl row 1", "list", "one response a prompt")),
        ([(0, None), (1, None), (2, None)], ("no response in it",)),
    ],
)
def test_responses_that_are_refused(responses, rows, parts):
    with pytest.raises(UserError) as error:
        responses(*rows)
    assert [] == [part for part in parts if part not in str(error.value)], str(error.value)


@pytest.mark.parametrize(
    ("number", "changes", "parts"),
    [
        (1, {"instruction_id_list": ["a:b", "keywords:letter_frequency"]}, ("row 1", "'a:b'", "punctuation:no_comma")),
        (1, {"kwargs": [{}, LETTERS]}, ("row 1", "number_words", "num_words", "kwargs has none", "mend the row")),
        (1, {"kwargs": [{**WORDS, "letter": "a"}, LETTERS]}, ("row 1", "number_words", "'letter'", "mend the row")),
        (1, {"kwargs": [WORDS]}, ("row 1", "one for each of the 2 instructions")),
        (2, {"instruction_id_list": []}, ("row 2", "at least one id")),
        (2, {"prompt": 3}, ("row 2", "prompt must be a string")),
        (2, {"prompt": ROWS[0][0]}, ("row 2", "the same prompt as row 0")),
    ],
)
def test_prompts_that_are_refused(prompts, number, changes, parts):
    with pytest.raises(UserError) as error:
        score_responses(prompts(lambda rows: rows[number].update(changes)), ["a", "b", "c"])
    assert [] == [part for part in ("prompts.jsonl", *parts) if part not in str(error.value)], str(error.value)


def test_arguments_that_are_null_are_none(prompts):
    """As the hub's form of the data has them."""
    every = {"num_words": None, "relation": None, "letter": None}
    assert score_responses(prompts(lambda rows: rows[0].update(kwargs=[every])), ["a", "b", "c"])["num_prompts"] == 3


def test_sentences_without_the_trained_model():
    import nltk
    from nltk.tokenize.punkt import PunktSentenceTokenizer, load_punkt_params

    own = nltk.data.find("tokenizers/punkt_tab/english/", paths=[str(lm_eval_setup._OWN_DATA)])
    splitter = PunktSentenceTokenizer()
    splitter._params = load_punkt_params(own)
    for text, count in (
        ("Dr. Smith met Mrs. Jones at 5 p.m. on Monday. They spoke!", 2),
        ("Use a tool, e.g. a saw, etc. and go on. Really? Yes.", 3),
        ("It cost 3.50 dollars. J. Doe paid.", 2),
        ("One line\nand no end", 1),
    ):
        assert len(splitter.tokenize(text)) == count, text


def test_without_the_extra(monkeypatch, prompts):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    lm_eval_setup.prepare_ifeval.cache_clear()
    with pytest.raises(UserError, match=r"lm_eval is not installed; run in the checkout: pip install -e '.\[eval\]'"):
        score_responses(prompts(), ["a", "b", "c"])


def test_lm_eval_is_imported_only_where_it_is_used(run_python):
    code = "import sys, lm_jax.evaluation.command; print(sorted({'lm_eval', 'nltk', 'langdetect'} & set(sys.modules)))"
    assert run_python("-c", code).strip() == "[]"


@pytest.mark.parametrize(
    ("response", "end", "followed"),
    [
        ("<think>no commas, please, ...</think>Hi there", "</think>", True),
        ("no commas, please, ...</think>\n\nHi there", "</think>", True),  # the prompt of generation began them
        ("[THINK]no, no[/THINK]Hi there", "[/THINK]", True),
        ("<think>no, no</think>Hi, there", "</think>", False),
        ("<think>no commas please", "</think>", False),  # thoughts that do not end are no answer
        ("<think>no commas, please, ...</think>Hi there", "", False),
        ("Hi there", "</think>", True),
        ("It is <think> that I mean", "</think>", True),
    ],
)
def test_thoughts_are_not_scored(tmp_path, prompts, response, end, followed):
    given = write(tmp_path / "given.jsonl", [{"prompt": ROWS[0][0], "response": response}])
    prompts()
    evaluate_ifeval(IfevalConfig(str(tmp_path / "prompts.jsonl"), given, f"{tmp_path}/scores.json", True, end))
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["prompt_level_strict_acc"] == scores["inst_level_loose_acc"] == followed
    thinking = bool(end) and (end in response or response.startswith("<think>"))
    assert (scores["num_thinking"], scores["num_unended"]) == (thinking, thinking and end not in response)
