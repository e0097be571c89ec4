"""Judged benchmarks without a judge: readers, rules, formulas and intervals, against numbers worked out elsewhere."""

import ast
import json

import numpy as np
import pytest
from scipy import stats

from lm_jax.errors import UserError
from lm_jax.evaluation.cfbench import CFBench, satisfies
from lm_jax.evaluation.complexbench import ComplexBench, with_dependencies
from lm_jax.evaluation.followbench import FollowBench
from lm_jax.evaluation.followbench_rules import follows, has_form
from lm_jax.evaluation.intervals import estimate
from lm_jax.evaluation.judged import Item, Verdict, markdown
from lm_jax.evaluation.pairwise import Pairwise
from lm_jax.evaluation.responses import answers_of, read_responses

YES, NO = True, False


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- CFBench ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("primary", "secondary", "satisfied"),
    [
        ([NO], [YES, YES], False),  # a primary one is not met
        ([YES, NO], [], False),
        ([YES, YES], [], True),
        ([YES], [YES, YES, NO], True),  # 0.5 + 0.5 * 0.67
        ([YES], [YES, YES, YES, NO, NO], False),  # 0.5 + 0.5 * 0.6 is 0.8 and not above it
        ([YES], [YES, NO], False),
        ([], [YES] * 4 + [NO], False),  # 0.8
        ([], [YES] * 5 + [NO], True),  # 0.83
    ],
)
def test_satisfaction_by_priority(primary, secondary, satisfied):
    assert satisfies(primary + secondary, [True] * len(primary) + [False] * len(secondary)) == satisfied


def test_an_instruction_without_a_verdict_is_left_out(tmp_path):
    rows = [{"prompt": f"{i}", "criteria": [["a", "主需", "x"], ["b", "次需", "y"]], "split": "easy"} for i in range(4)]
    bench = CFBench(write(tmp_path / "cf.jsonl", rows), None)
    verdicts = {"0": Verdict((YES, YES)), "1": Verdict((YES, NO)), "2": Verdict(None, "unparsable")}
    scores, _ = bench.score(["r"] * 4, verdicts)  # nothing was asked about the last
    assert {m: (e.value, e.n) for m, e in scores["all"].items()} == {"CSR": (0.75, 2), "ISR": (0.5, 2), "PSR": (0.5, 2)}
    assert (scores["x"]["met"].value, scores["y"]["met"].value) == (1.0, 0.5)
    assert bench.score(["r"] * 4, {})[0] == {}


def test_released_files_are_read_whole(shared_data):
    bench = CFBench(str(shared_data / "cfbench.json"), None)
    assert len(bench.items) == 999 and bench.items[810].where.endswith("row 811")  # row 810 has no prompt
    assert bench.score([None] * 999, {}) == ({}, {"num_without_prompt": 1})
    bench = FollowBench(str(shared_data / "followbench"), None)
    assert len(bench.items) == 820
    asked, ruled = bench.questions(["r"] * 820), bench.ruled(["r"] * 820)
    assert {q.item for q in asked} | set(ruled) == set(range(820)) and len(asked) + len(ruled) == 820
    assert len(ruled) == 5 * 40 + 5 * (30 + 12 + 30) // 6 + 5 * (18 + 5 * 6) // 6 + 5 * (30 + 3 * 6) // 6


def test_the_judge_sees_the_reference_answer_where_there_is_one(tmp_path):
    rows = [{"prompt": "P", "criteria": [["a {b}", "主需"]], "gold": gold} for gold in ("", "G")]
    bench = CFBench(write(tmp_path / "cf.jsonl", rows), None)
    without, with_gold = (q.prompt for q in bench.questions(["R {x}", "R"]))
    assert "reference" not in without and "<reference_answer>\nG\n" in with_gold
    assert "<response>\nR {x}\n</response>" in without and "1. a {b}" in without
    assert without.endswith("\n\n1: YES or NO")
    assert [q.item for q in bench.questions([None, "R"])] == [1]


# --- FollowBench -----------------------------------------------------------------------------------------------------


def chain(levels=range(6), **changes):
    base = {"example_id": 1, "category": "style", "source": "quora", "target": ""}
    return [{**base, "level": level, "instruction": f"do {level}", **changes} for level in levels]


def follow(tmp_path, rows) -> FollowBench:
    return FollowBench(write(tmp_path / "follow.jsonl", rows), None)


def test_consecutive_levels(tmp_path):
    bench = follow(tmp_path, [*chain(), *chain(range(1, 6), example_id=2), *chain(range(3), example_id=3)])

    def csl(**unmet):
        """Mean CSL where the levels named (numbers of items) are not met, or not known (None)."""
        verdicts = {str(n): Verdict((YES,) * (n % 5 + 1)) for n in range(12)}
        verdicts |= {n[1:]: Verdict(None if value is None else (NO,)) for n, value in unmet.items()}
        scores, counts = bench.score(["r"] * 12, verdicts)
        return scores["all"]["CSL"].value if "all" in scores else None, counts["num_without_csl"]

    assert len(bench.items) == 12  # level 0 is not answered
    assert csl() == (5.0, 1)  # the third has levels 1 and 2 alone
    assert csl(_2=NO) == ((2 + 5) / 2, 1)
    assert csl(_2=NO, _3=None) == ((2 + 5) / 2, 1)  # what comes after it changes nothing
    assert csl(_2=None) == (5.0, 2)
    assert csl(_11=NO) == ((5 + 5 + 1) / 3, 0)
    assert csl(_0=NO, _5=NO, _10=NO) == (0.0, 0)


def test_a_chain_may_lack_level_0(tmp_path):
    bench = follow(tmp_path, chain(range(1, 4)))
    last = bench.questions(["r"] * 3)[2]
    assert last.points == 3 and "<instruction_1>" in last.prompt and "Instruction 0" not in last.prompt
    assert "Instruction 0 is a task" in follow(tmp_path, chain()).questions(["r"] * 5)[0].prompt
    empty = chain()
    empty[0]["instruction"] = ""
    assert follow(tmp_path, empty).questions(["r"] * 5)[2].prompt == last.prompt


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        (chain(range(2, 6)), ("row 0", "is at level 2", "level 1", "one after the other")),
        ([*chain(range(3)), *chain(range(4, 6))], ("row 3", "level 4")),
        ([*chain(range(2)), *chain(range(2, 3), example_id=2)], ("row 2", "example 2")),
        (chain([1], level=6), ("row 0", "level must be")),
        (chain([1], level="1"), ("row 0", "level must be", "'1'")),
        (chain([1], target=None), ("row 0", "target must be a text")),
        (chain([1], instruction=" "), ("row 0", "instruction is empty")),
        ([{"example_id": 1, "level": 1}], ("row 0", "column 'category' is missing")),
    ],
)
def test_chains_that_are_refused(tmp_path, rows, parts):
    with pytest.raises(UserError) as error:
        follow(tmp_path, rows)
    assert [] == [part for part in ("follow.jsonl", *parts) if part not in str(error.value)], error.value


def test_a_directory_without_files(tmp_path):
    with pytest.raises(UserError, match="no file .*_constraints.json in it"):
        FollowBench(str(tmp_path), None)


def test_targets_pass_their_own_rules(shared_data):
    """Every reference of the rule-checked rows passes, and does not when it is changed."""
    checked = set()
    for file in sorted((shared_data / "followbench").glob("*.json")):
        for row in json.loads(file.read_text()):
            target, source = row["target"], row["source"]
            if "answer" in row:
                checked.add("example")
                assert has_form(target, row["answer"], row["answer"]), row
                if not target.endswith("\n{answer}"):
                    assert not has_form(target, row["answer"], f"My {row['answer']}"), row
            elif target and row["level"] and row["category"] != "mixed":
                checked.add(source)
                right = ast.literal_eval(target)[0] if source == "CONLL2003" else target
                assert follows(source, row["level"], target, f" {right}\n"), row
                assert not follows(source, row["level"], target, "I do not know."), row
    assert checked == {
        *("example", "E2E", "WIKIEVENTS", "CONLL2003", "text_editing"),
        *("BBH_logical", "BBH_time", "self_made_space", "gsm_8k"),
    }


SUMMARIES = {  # a summary that meets all five, and one that meets those before each
    "cnn_dailymail": (
        "Young Potter is rich. The actor plays on. His films have made money.",
        "Young Potter is rich. The actor plays on.",
        "Young Potter is rich" + " and" * 11 + ". The actor plays on. His films have made money.",
        "Young Potter is rich. The man plays on. His films have made money.",
        "Young Potter is rich. The lavish actor plays on. His films have made money.",
        "Young Potter is rich. The actor plays on. His films made money.",
    ),
    "xsum": (
        "The operation is running well.",
        "The operation is running. Well.",
        "The operation is running" + " well" * 16 + ".",
        "The operation in Newton Stewart is running.",
        "The operation runs well.",
        "The repair is running well.",
    ),
    "samsum": (
        "Kim does stuff.",
        "Kim does stuff. Tim too.",
        "Kim does stuff" + " well" * 12 + ".",
        "Kim does things.",
        "Kim does stuff, procrastinating.",
        "Kim does stuff, well.",
    ),
    "gigaword": (
        "two people killed in attack in southern philippines",
        "two people killed in attack",
        "two people killed in attack, in southern philippines",
        "two people killed in attack in southern Philippines",
        "two people killed in bus attack in philippines",
        "two people killed by attack on southern philippines",
    ),
    "arxiv": (
        "We edit activations.",
        "We edit activations. It works.",
        "We edit" + " many" * 18 + " activations.",
        "Here we edit activations.",
        "We edit facts.",
        "We edit transformer activations.",
    ),
}


@pytest.mark.parametrize("source", SUMMARIES)
def test_summaries_by_level(source):
    whole, *lacking = SUMMARIES[source]
    assert all(follows(source, level, "", whole) for level in range(1, 6))
    for level, text in enumerate(lacking, 1):
        assert [follows(source, at, "", text) for at in range(1, 6)] == [at < level for at in range(1, 6)], text


def test_a_form_keeps_to_one_line_unless_the_reference_does_not():
    template = "{instruction}\nBot: {answer}"
    assert has_form(template, "Bot: x", "Bot: (a.b) y ")
    assert not has_form(template, "Bot: x", "Bot: y\nMore")
    assert has_form(template, "Bot: x\nz", "Bot: y\nMore")
    assert has_form("{instruction}\n{{'A': '{answer}'}}", "", "{'A': 'x'}")
    assert not has_form("{instruction}\n{{'A': '{answer}'}}", "", "{'A': x}")


# --- questions that depend, pairs ------------------------------------------------------------------------------------


def test_dependencies():
    assert with_dependencies([NO, YES, YES, YES], [[], [0], [1], []]) == [NO, NO, NO, YES]
    assert with_dependencies([YES, NO, YES], [[2], [], [1]]) == [NO, NO, NO]


@pytest.mark.parametrize(
    ("questions", "parts"),
    [
        ([], ("row 0", "at least one")),
        ([{"question": ""}], ("scoring_questions[0]", "with a question")),
        ([{"question": "a", "dep": [1]}], ("scoring_questions[0]: dep", "0 to 0")),
        ([{"question": "a", "dep": [1]}, {"question": "b", "dep": [0]}], ("[0, 1]", "circle")),
        ([{"question": "a", "composition_types": "And"}], ("composition_types must be a list",)),
    ],
)
def test_questions_that_are_refused(tmp_path, questions, parts):
    with pytest.raises(UserError) as error:
        ComplexBench(write(tmp_path / "c.jsonl", [{"instruction": "i", "scoring_questions": questions}]), None)
    assert [] == [part for part in ("c.jsonl row 0", *parts) if part not in str(error.value)], error.value


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"prompt": "p"}, "column 'criteria' is missing"),
        ({"prompt": "p", "criteria": []}, "at least one requirement"),
        ({"prompt": "p", "criteria": [["a"]]}, "criteria[0] must be [requirement, priority"),
        ({"prompt": "p", "criteria": [["a", "first"]]}, "priority 'first'"),
        ({"prompt": " ", "criteria": [["a", "主需"]]}, "prompt must be a text"),
        ({"prompt": "p", "criteria": [["a", "主需"]], "gold": 3}, "gold must be a text"),
    ],
)
def test_requirements_that_are_refused(tmp_path, row, part):
    with pytest.raises(UserError) as error:
        CFBench(write(tmp_path / "cf.jsonl", [row]), None)
    assert "cf.jsonl row 0" in str(error.value) and part in str(error.value)


def test_pairs_that_are_refused(tmp_path):
    with pytest.raises(UserError, match="row 0: output must be a text"):
        Pairwise(write(tmp_path / "p.jsonl", [{"instruction": "i", "output": None}]), None)


def test_pairs_are_compared_without_thoughts(tmp_path):
    file = write(tmp_path / "p.jsonl", [{"instruction": "i", "output": "<think>hm</think>\nTheirs"}])
    answers = answers_of(["so</think> Ours"], "</think>")
    prompts = [q.prompt for q in Pairwise(file, None, "</think>").questions(answers.texts)]
    assert all("Ours" in p and "Theirs" in p and "think" not in p for p in prompts) and len(prompts) == 2
    assert "<think>hm</think>" in Pairwise(file, None, "").questions(["Ours"])[0].prompt


def test_answers_of_responses():
    given = ["<think>a</think>\n\nb", None, "b", " <think>a", "a</think>b</think>c", ""]
    found = answers_of(given, "</think>")
    assert found.texts == ("b", None, "b", "", "c", "") and (found.thinking, found.unended) == (3, 1)
    assert answers_of(given, "").texts == tuple(given)


# --- responses -------------------------------------------------------------------------------------------------------


def test_responses_are_matched_by_text(tmp_path):
    prompts = [Item(text, f"row {i}") for i, text in enumerate(("a", "b", "a", "c", "c"))]
    rows = [
        {"prompt": "a", "response": "1"},
        {"instruction": "b", "output": "2"},
        {"prompt": [{"role": "user", "content": "a"}], "response": "3"},
        {"prompt": "c", "generated": "4"},  # of both
        {"prompt": "z", "response": "5"},
    ]
    path = write(tmp_path / "r.jsonl", rows)
    found = read_responses(path, prompts, False, allow_others=True)
    assert found.texts == ("1", "2", "3", "4", "4") and found.others == (4,)
    with pytest.raises(UserError, match="row 4: its prompt .'z'. is not"):
        read_responses(path, prompts, False)
    with pytest.raises(UserError, match="row 1: answers the same prompt as row 0"):
        read_responses(write(tmp_path / "twice.jsonl", [rows[1], rows[1]]), prompts, True)
    with pytest.raises(UserError, match="column 'response' is missing; it has prompt"):
        read_responses(write(tmp_path / "none.jsonl", [{"prompt": "a"}]), prompts, True)


# --- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("met", [0, 1, 7, 20])
def test_shares_have_wilsons_interval(met):
    found = estimate([1.0] * met + [0.0] * (20 - met))
    bounds = stats.binomtest(met, 20).proportion_ci(0.95, method="wilson")
    assert (found.value, found.low, found.high) == pytest.approx((met / 20, bounds.low, bounds.high), abs=1e-9)


def test_means_have_a_bootstrap_over_instructions():
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 9, 60)
    totals = rng.binomial(sizes, 0.7)

    def ratio(a, b, axis):
        return a.sum(axis) / b.sum(axis)

    drawn = stats.bootstrap((totals, sizes), ratio, paired=True, method="percentile", n_resamples=4000, rng=rng)
    found = estimate(totals, sizes)
    expected = (totals.sum() / sizes.sum(), *drawn.confidence_interval)
    assert (found.value, found.low, found.high) == pytest.approx(expected, abs=0.01)
    assert estimate(totals, sizes) == found  # the same every time


def test_equal_values_leave_something_open():
    """Of a bootstrap they would not: every resample is the same."""
    found = estimate([0.5] * 10)
    assert found.value == 0.5 and found.low < 0.3 and found.high > 0.7
    longest = estimate([5.0] * 10, maximum=5.0)
    assert (longest.value, longest.high) == pytest.approx((5.0, 5.0)) and 3 < longest.low < 4
    assert estimate([]) is None


def test_a_table_for_each_set_of_metrics():
    scores = {"all": {"x": estimate([1.0, 0.0])}, "a|b": {"x": estimate([1.0])}, "other": {"y": estimate([0.0])}}
    first, second = markdown("m", scores).split("\n\n")
    assert first.splitlines()[0] == "| m | x | n |" and first.splitlines()[3].startswith("| a/b | 1.000 [")
    assert second.splitlines()[2].startswith("| other | 0.000 [0.000, ")
