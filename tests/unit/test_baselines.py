"""The baselines of MuSC around a scripted model whose judgements are known: what is chosen is what should be."""

import collections
import statistics
import time

import pytest

from lm_jax.errors import UserError
from musc_jax.pairs.drops import Drop
from musc_jax.pairs.judgements import parse_critique, parse_revision, parse_score
from musc_jax.pairs.methods import PLANS
from musc_jax.pairs.prompts import STOP
from musc_jax.pairs.tasks import Task
from tests.strong_model import Scripted, careless, core, cut, failed, manners, points_done, stage_of
from tests.unit import test_pairs
from tests.unit.test_pairs import content, counts_of, instructions, reasons

pairs = test_pairs.pairs  # the fixture
METHODS = [name for name in PLANS if name != "musc"]
COLUMNS = {
    "self_reward": ["chosen_score", "rejected_score", "scores"],
    "branch_solve_merge": ["constraints", "chosen_score", "rejected_score", "scores"],
    "self_correct": ["critique"],
}
JUDGES = ("score", "meets")


def model(change=lambda text, asked: text, **options) -> Scripted:
    """The scripted model, whose responses lack points, with a change after that."""
    return Scripted(lambda text, asked: change(careless(text, asked), asked), **options)


def assert_valid(row: dict, method: str) -> None:
    assert list(row) == ["id", "prompt", "chosen", "rejected", *COLUMNS[method], "original_instruction", "input"]
    for name, role in {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}.items():
        assert [message["role"] for message in row[name]] == [role] and content(row[name]).strip()
    assert content(row["chosen"]) != content(row["rejected"])
    assert content(row["prompt"]) == row["original_instruction"]
    if method != "self_correct":
        assert row["chosen_score"] == max(row["scores"]) > min(row["scores"]) == row["rejected_score"]


# --- what comes out --------------------------------------------------------------------------------------------------


def share(row: dict, side: str) -> float:
    """Of the instruction's points, those that a side has."""
    return statistics.fmean(points_done(row["original_instruction"], content(row[side])))


def test_self_reward(pairs):
    asked = model()
    rows = instructions(40)
    made, dropped, counts = pairs(rows, asked, method="self_reward", num_samples=5, judge_samples=2)
    assert len(made) > 25 and {*reasons(counts)} <= {"judge", "respond"} and counts["left_out"] == {}
    texts = {row["id"]: Task(0, row["instruction"], row.get("input", "")).text for row in rows}
    for row in made:
        assert_valid(row, "self_reward")
        assert row["original_instruction"] == texts[row["id"]]
        # The oracle's own scores of the two, by the points that they have
        for side in ("chosen", "rejected"):
            assert row[f"{side}_score"] == 1 + int(4 * share(row, side))
        assert share(row, "chosen") > share(row, "rejected")
    ids = collections.Counter(
        request.id.rsplit("/respond/")[0] for request in asked.requests if "/respond/" in request.id
    )
    assert {*ids.values()} == {5} and len(ids) == 40
    judged = collections.Counter(r.id.rsplit("/", 1)[0] for r in asked.requests if "/judge/" in r.id)
    assert {*judged.values()} == {2}


def test_branch_solve_merge(pairs):
    made, _, counts = pairs(instructions(40), model(), method="branch_solve_merge", judge_samples=1)
    assert len(made) > 25 and counts["left_out"] == {}
    zero = 0
    for row in made:
        assert_valid(row, "branch_solve_merge")
        for side in ("chosen", "rejected"):
            met = [core(constraint) in content(row[side]) for constraint in row["constraints"]]
            assert row[f"{side}_score"] == statistics.fmean(met)
            zero += row[f"{side}_score"] == 0
    assert zero  # a response that meets nothing has a score: it is the worst


def test_self_correct(pairs):
    made, dropped, counts = pairs(instructions(40), model(), method="self_correct")
    assert counts["pairs"] > 20 and reasons(counts) == {"critique": {"nothing_to_correct": counts["dropped"]}}
    assert counts["dropped"] > 0
    for row in made:
        assert_valid(row, "self_correct")
        assert share(row, "chosen") == 1 > share(row, "rejected")
        done = points_done(row["original_instruction"], content(row["rejected"]))
        assert row["critique"].count("It does not do this") == done.count(False)
    for row in dropped:
        assert row["chosen"] is None and all(points_done(row["original_instruction"], row["rejected"]))


@pytest.mark.parametrize("method", METHODS)
def test_tasks_of_the_models_own(pairs, method):
    asked = model()
    made, _, counts = pairs(None, asked, method=method, num_instructions=30)
    assert counts["input"] == 30 and len(made) > 15
    for row in made:
        assert_valid(row, method)
    stages = {request.id.split("/")[1] for request in asked.requests}
    assert stages == {*PLANS[method].stages} - {"decompose"}  # what it invents comes with its constraints


@pytest.mark.parametrize("method", METHODS)
def test_raw_text(pairs, method):
    asked = model()
    made, _, counts = pairs(model=asked, method=method, format="text", text_template="Q: {instruction}\nA:")
    assert counts["pairs"] > 6 and all(isinstance(request.prompt, str) for request in asked.requests)
    for row in made:
        assert row["prompt"] == f"Q: {row['original_instruction']}\nA:" and isinstance(row["chosen"], str)
    stops = dict(zip(dict.fromkeys(r.id.split("/")[1] for r in asked.requests), asked.samplings, strict=True))
    assert {stage: sampling.stop for stage, sampling in stops.items()} == {
        stage: (*STOP, "\nQ:") if stage == "respond" else STOP for stage in stops
    }


def test_scores_are_means_of_what_can_be_read(pairs):
    """Of three verdicts one differs and one cannot be read: the score is the mean of the other two."""
    given = collections.defaultdict(list)

    def change(text, asked):
        if stage_of(asked) != "score":
            return text
        verdicts = given[asked.body["messages"][-1]["content"]]
        verdicts.append(("no number", 2, 5)[len(verdicts) % 3] if "0 of" not in text else 1)
        return f"Reasons:\nSo.\n\nScore: {verdicts[-1]}"

    made, _, counts = pairs(instructions(40), model(change), method="self_reward", judge_samples=3)
    unread = sum(verdicts.count("no number") for verdicts in given.values())
    assert counts["left_out"] == {"judge": {"unparsable": unread}} and unread > 40
    assert made and {row["chosen_score"] for row in made} == {3.5} and {row["rejected_score"] for row in made} == {1.0}


# --- what does not ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "stage", "change", "dropped", "left_out"),
    [
        ("self_reward", "score", lambda t, a: "Score: 4", {"judge": "tie"}, {}),
        ("self_reward", "score", lambda t, a: "It is good.", {"judge": "not_enough_scored"}, {"judge": "unparsable"}),
        ("self_reward", "score", lambda t, a: failed(), {"judge": "not_enough_scored"}, {"judge": "no_answer"}),
        ("self_reward", "respond", lambda t, a: "Done.", {"respond": "identical_pair"}, {}),
        ("self_reward", "respond", lambda t, a: cut(t), {"respond": "truncated"}, {"respond": "truncated"}),
        ("self_reward", "respond", lambda t, a: failed(), {"respond": "no_answer"}, {"respond": "no_answer"}),
        ("self_reward", "respond", lambda t, a: " ", {"respond": "empty_response"}, {"respond": "empty_response"}),
        ("branch_solve_merge", "decompose", lambda t, a: "Hm.", {"decompose": "unparsable"}, {}),
        ("branch_solve_merge", "meets", lambda t, a: "1. yes", {"judge": "not_enough_scored"}, {"judge": "unparsable"}),
        ("branch_solve_merge", "meets", lambda t, a: t.replace("no", "yes"), {"judge": "tie"}, {}),
        ("self_correct", "respond", lambda t, a: "I cannot help with that.", {"respond": "refusal"}, {}),
        ("self_correct", "respond", lambda t, a: a.prompt, {"respond": "echo"}, {}),
        ("self_correct", "critique", lambda t, a: "None", {"critique": "nothing_to_correct"}, {}),
        ("self_correct", "critique", lambda t, a: "", {"critique": "empty"}, {}),
        ("self_correct", "revise", lambda t, a: cut(t), {"revise": "truncated"}, {}),
        ("self_correct", "revise", lambda t, a: failed(), {"revise": "no_answer"}, {}),
    ],
)
def test_a_fault_at_a_stage(pairs, tmp_path, method, stage, change, dropped, left_out):
    """Every row leaves there for the reason, and the answers that could not be used are counted."""
    rows = [row | {"instruction": f"{row['instruction']} Add more. And more. And yet more."} for row in instructions()]
    asked = model(lambda text, a: change(text, a) if stage_of(a) == stage else text)
    settings = {"method": method, "max_failed_share": 1.0, "num_samples": 6, "judge_samples": 2}
    with pytest.raises(UserError, match="^no pair left: of 12 rows all were dropped, 12 "):
        pairs(rows, asked, **settings)
    counts = counts_of(tmp_path / "pairs/out.jsonl")
    assert reasons(counts) == {at: {reason: 12} for at, reason in dropped.items()}
    at = next(iter(left_out), None)
    asked_there = sum(f"/{at}/" in request.id for request in asked.requests)
    assert counts["left_out"] == {at: {reason: asked_there} for at, reason in left_out.items()}


def test_a_revision_that_changes_nothing(pairs, tmp_path):
    first = {}

    def change(text, asked):
        instruction = asked.prompt.removeprefix("Instruction:\n").split("\n\nResponse:\n")[0]
        if stage_of(asked) == "revise":
            return f"Revised response:\n{first[instruction]}"
        if stage_of(asked) == "respond":
            first[instruction] = text
        return text

    with pytest.raises(UserError, match="identical_pair"):
        pairs(model=model(change), method="self_correct")
    assert reasons(counts_of(tmp_path / "pairs/out.jsonl"))["revise"].keys() == {"identical_pair"}


def test_some_responses_that_will_not_do(pairs):
    """They are not chosen among; the others are."""
    bad = "I'm sorry, but I can't help with that."
    change = lambda t, a: bad if stage_of(a) == "respond" and a.body["seed"] % 3 == 0 else t  # noqa: E731
    made, _, counts = pairs(instructions(40), model(change), method="self_reward", num_samples=6, judge_samples=1)
    assert counts["left_out"]["respond"]["refusal"] > 40 and len(made) > 25
    for row in made:
        assert_valid(row, "self_reward")
        assert bad not in (content(row["chosen"]), content(row["rejected"]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("manner", manners())
def test_malformed_manners(pairs, tmp_path, method, manner):
    """Of all answers, and of every tenth one: nothing but counted drops and valid rows."""
    settings = {"method": method, "max_failed_share": 1.0, "judge_samples": 2}
    change = manners()[manner]
    try:
        made, _, _ = pairs(model=model(change), **settings)
    except UserError as error:
        made = []
        assert str(error).startswith("no pair left: of 12 rows") and counts_of(tmp_path / "pairs" / "out.jsonl")
    some = model(lambda t, a: change(t, a) if a.body["seed"] % 10 == 0 else t)
    more, _, counts = pairs(instructions(40), some, name="some", **settings)
    assert 10 < counts["pairs"] <= 40
    for row in made + more:
        assert_valid(row, method)


# --- reading judgements ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Reasons:\nGood.\n\nScore: 4", 4),
        ("Score: 4/5", 4),
        ("**Score:** 3 out of 5.", 3),
        ("It does all.\n\n### Final score: **5**\n", 5),
        ("My score is 2.", 2),
        ("3", 3),
        ("5/5", 5),
        ("评分：4分", 4),
        ("<think>Score: 1?</think>Score: 2", 2),
        ("Score: 4\n\nSo once more,\nScore: 4", 4),
        ("Good.\nScore: 5\n\n###\n\nInstruction:\nx\n\nScore: 1", 5),
        ("Score: 0", Drop.UNPARSABLE),
        ("Score: 6", Drop.UNPARSABLE),
        ("Score: 45", Drop.UNPARSABLE),
        ("Score: 3.5", Drop.UNPARSABLE),
        ("Score: 4/10", Drop.UNPARSABLE),
        ("Score: 3-4", Drop.UNPARSABLE),
        ("Score: 4 or 5", Drop.UNPARSABLE),
        ("Score: four", Drop.UNPARSABLE),
        ("Score:", Drop.UNPARSABLE),
        ("Score: 2\nScore: 5", Drop.UNPARSABLE),
        ("Score: 2\nScore: high", Drop.UNPARSABLE),
        ("It has 4 points and 5 lines.", Drop.UNPARSABLE),
        ("-3", Drop.UNPARSABLE),
        ("", Drop.EMPTY),
        ("###\n", Drop.EMPTY),
        ("<think>Score: 4", Drop.TRUNCATED),
        ("I cannot help with that.", Drop.REFUSAL),
    ],
)
def test_scores(answer, score):
    assert parse_score(answer) == score
    if not isinstance(score, Drop) and "###\n\nInstr" not in answer:
        assert parse_score(answer, "length") == Drop.TRUNCATED


@pytest.mark.parametrize(
    "answer",
    [
        *("None", "None.", "Faults:\nNone", "**Faults:** none", "1. None", "No faults.", "Nothing to correct."),
        *("There are no faults in this response.", "The response meets all constraints.", "N/A", "没有问题。", "无"),
        *("No changes are needed.", "The response is correct and complete.", "It does all that is asked."),
    ],
)
def test_critiques_without_a_fault(answer):
    assert parse_critique(answer) == Drop.NOTHING_TO_CORRECT


FAULTS = (
    "Nonetheless it rambles.",
    "None of the lines rhymes.",
    "Nothing is said about tea.",
    "There is no rhyme in it.",
    "No mention of tea.",
    "The response does not rhyme.",
    "The response has no title.",
    "It is good, but too long.",
    "无标题。",
)


@pytest.mark.parametrize(
    ("answer", "faults"),
    [
        ("Faults:\n1. It rhymes.\n2. It is long.", "1. It rhymes.\n2. It is long."),
        ("It has two sentences instead of one.", "It has two sentences instead of one."),
        ("No faults in grammar, but it is too long.", "No faults in grammar, but it is too long."),
        ("1. None of the lines rhymes.\n2. It is long.", "1. None of the lines rhymes.\n2. It is long."),
        *((text, text) for text in FAULTS),
        ("", Drop.EMPTY),
        ("Faults:\n", Drop.EMPTY),
        ("I'm sorry, but I can't help with that.", Drop.REFUSAL),
    ],
)
def test_critiques(answer, faults):
    assert parse_critique(answer) == faults
    assert parse_critique(answer or "x", "length") == Drop.TRUNCATED


@pytest.mark.parametrize(
    ("answer", "revision"),
    [
        ("Revised response:\nA poem.", "A poem."),
        ("**Revised response:** A poem.", "A poem."),
        ("Here is the revised response:\n\nA poem.", "A poem."),
        ("Sure! Here's a corrected version: A poem.", "A poem."),
        ("修改后的回答：好。", "好。"),
        ("New York is a city: big.", "New York is a city: big."),
        ("The revised edition came out in 1900.", "The revised edition came out in 1900."),
        ("None of us was there.", "None of us was there."),
        ("```\ncode\n```", "code"),
        ("A poem.\n\n###\n\nInstruction:\nmore", "A poem."),
        ("Write it.", Drop.ECHO),
        ("The response needs no correction.", Drop.NOTHING_TO_CORRECT),
        ("Revised response:", Drop.EMPTY),
    ],
)
def test_revisions(answer, revision):
    assert parse_revision(answer, "Write it!") == revision


def test_no_answer_stalls_a_parser():
    pieces = [
        "\n",
        " ",
        "*",
        "#",
        "Score: ",
        "Score: 4\n",
        "Faults: ",
        "None ",
        "Revised response ",
        "here is ",
        "```",
        "无",
    ]
    answers = [piece * 20_000 for piece in pieces] + [f"a{piece * 20_000}b" for piece in pieces]
    answers += [
        f"{label}{piece * 20_000}x" for label in ("Score", "Faults", "The revised response") for piece in pieces
    ]
    started = time.process_time()
    for answer in answers:
        for parse in (parse_score, parse_critique, lambda text: parse_revision(text, "Write it.")):
            assert isinstance(parse(answer), (str, float))
    assert time.process_time() - started < 20


# --- stopped and called again, and settings --------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_stopped_after_every_few_answers(pairs, tmp_path, method):
    settings = {"method": method, "num_samples": 3, "judge_samples": 2}
    _, _, counts = pairs(model=model(), name="whole", **settings)
    assert counts["pairs"] > 4
    asked = []
    for _ in range(200):
        stopping = model(stop_after=9)
        try:
            pairs(model=stopping, **settings)
            break
        except UserError as error:
            assert "went away" in str(error)
        finally:
            asked += [request.id for request in stopping.requests]
    assert len(asked) > 24 and len({*asked}) == len(asked)  # none was asked twice
    for end in ("", ".counts.json", ".dropped.jsonl"):
        assert (tmp_path / f"pairs/out.jsonl{end}").read_bytes() == (tmp_path / f"whole/out.jsonl{end}").read_bytes()
    kept = {path.name for path in (tmp_path / "pairs/out.jsonl.stages").iterdir()}
    stages = PLANS[method].stages[1:]
    assert kept == {f"{stage}.jsonl{end}" for stage in stages for end in ("", ".run.json")}


def test_other_settings_of_a_run_that_was_stopped(pairs):
    """What no finished stage has read may change, nothing else."""
    settings = {"method": "self_reward", "num_samples": 3, "judge_samples": 1}
    with pytest.raises(UserError, match="went away"):
        pairs(model=model(stop_after=37), **settings)  # 36 responses, some verdicts
    for changed, part in (
        ({"num_samples": 4}, "respond.jsonl: made with config.num_samples=3, now 4"),
        ({"respond": {"temperature": 0.9}}, "respond.jsonl: made with config.respond.temperature=0.5, now 0.9"),
        ({"judge_samples": 2}, "judge.jsonl.run.json: this run was begun with config.judge_samples=1, now 2"),
        ({"method": "branch_solve_merge"}, 'config.method="self_reward", now "branch_solve_merge"'),
    ):
        with pytest.raises(UserError, match=part):
            pairs(model=model(), **{**settings, **changed})
    again = model()
    changed = {
        "perturb": {"ratio": 0.5},
        "decompose": {"temperature": 0.9, "max_new_tokens": 9},
    }  # which it never reads
    assert pairs(model=again, **settings, **changed)[2]["pairs"] > 6
    assert {request.id.split("/")[1] for request in again.requests} == {"judge"}


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"method": "dpo"}, "config.method='dpo': must be musc, self_reward, branch_solve_merge, self_correct"),
        ({"num_samples": 1}, "config.num_samples=1: must be at least 2"),
        ({"judge_samples": 0}, "config.judge_samples=0: must be at least 1"),
        (
            {"method": "self_reward", "respond": {"temperature": 0.0}},
            "config.respond.temperature=0.0: config.num_samples=4",
        ),
        ({"method": "branch_solve_merge", "judge": {"temperature": 0.0}}, "config.judge_samples=3 would give the same"),
        ({"judge": {"temperature": -1.0}}, "config.judge.temperature=-1.0"),
        ({"revise": {"max_new_tokens": 0}}, "config.revise.max_new_tokens=0"),
    ],
)
def test_settings(pairs, tmp_path, settings, part):
    asked = Scripted()
    with pytest.raises(UserError) as raised:
        pairs(model=asked, **settings)
    assert part in str(raised.value) and not asked.requests
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    if "judge" in settings:  # one verdict may be the likeliest
        pairs(model=model(), method="self_reward", judge_samples=1, judge={"temperature": 0.0})


def test_the_table(pairs, capsys):
    change = lambda t, a: "No." if stage_of(a) in JUDGES and a.body["seed"] % 4 == 0 else t  # noqa: E731
    _, _, counts = pairs(model=model(change), method="self_reward")
    unread = counts["left_out"]["judge"]["unparsable"]
    assert capsys.readouterr().out.endswith(f"judge: answers left out: {unread} unparsable\n")


# --- who reads the rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_loads_with_datasets_and_into_training(pairs, tmp_path, method):
    import datasets

    from lm_jax.data.text import TextEncoder
    from lm_jax.data.tokenizers import load_tokenizer
    from musc_jax.training.examples import load_pairs
    from tests.checkpoints import make_tokenizer

    made, _, _ = pairs(model=model(), method=method)
    path = f"{tmp_path}/pairs/out.jsonl"
    table = datasets.load_dataset("json", data_files=path, split="train", cache_dir=f"{tmp_path}/cache")
    assert table.to_list() == made
    make_tokenizer(tmp_path / "model")
    encoder = TextEncoder(load_tokenizer(f"{tmp_path}/model"), 4096)
    loaded = load_pairs(path, encoder, "auto")
    assert loaded.rule == "uniform" and [row.id for row in loaded.rows] == [row["id"] for row in made]
    assert [(row.prompt, row.chosen, row.rejected) for row in loaded.rows] == [
        (row["prompt"], row["chosen"], row["rejected"]) for row in made
    ]


def test_trl_takes_the_file(pairs, tmp_path):
    """Its DPOTrainer sees the same tokens as our encoder, whatever columns come with the rows."""
    pairs(instructions(6), model(), name="pairs", method="branch_solve_merge")
    test_pairs.assert_trl_sees_the_same(tmp_path, f"{tmp_path}/pairs/out.jsonl")
