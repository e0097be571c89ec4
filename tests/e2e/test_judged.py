"""`launch.evaluate` with a judge behind a scripted server: scores worked out by hand, and everything around them."""

import json
import re
import signal
import subprocess
import time

import pytest

from tests.e2e import common
from tests.e2e.common import arguments, fork
from tests.http_server import Server, completion

# Requirements that the judge says are not met, by row of the first 20 of CFBench; in row 15 it does not answer as asked
CF_UNMET = {
    **{1: {1}, 2: {3}, 3: {5}, 4: {3, 4}, 5: {2, 3}, 7: {2, 3}, 8: {3}, 9: {3}, 10: {9}, 12: {2}},
    **{13: {1, 2, 3, 4, 5, 6}, 16: {6}, 17: {2, 3}},
}
CF_UNREADABLE = 15
# The same of the first four examples of FollowBench's style category, by (example, level)
FOLLOW_UNMET = {
    **{(2, 2): {2}, (2, 4): {1, 4}, (2, 5): {5}},
    **{(3, 1): {1}, (3, 2): {1}, (3, 3): {1}},
    **{(4, 5): {1, 2, 3, 4, 5}},
}
FOLLOW_UNREADABLE = (4, 3)


def points(asked) -> list[int]:
    """The numbers that the prompt's own form of an answer has."""
    return [int(number) for number in re.findall(r"^(\d+): YES or NO$", asked.prompt, re.MULTILINE)]


def judge(unmet, unreadable):
    """A script that finds in the prompt the response `<<key>>` and says NO to `unmet[key]`, in several dresses."""

    def script(asked):
        (found,) = re.findall(r"<<(.*?)>>", asked.prompt)
        key = json.loads(found)
        key = tuple(key) if isinstance(key, list) else key
        told = {n: "NO" if n in unmet.get(key, ()) else "YES" for n in points(asked)}
        if key == unreadable:
            told[2] = "MAYBE"
        dress = ["{}: {}", "- **{}: {}.**", "{}) {}", "{}：{}"][asked.number % 4]
        lines = [dress.format(n, word.lower() if asked.number % 2 else word) for n, word in told.items()]
        return completion(asked, ["1. It is there, 2. It is not: NO\n\n" + "\n".join(lines)])

    return script


def evaluate(preset: str, server: Server | None, tmp_path, *settings):
    where = (f"judge.endpoint.url={server.url}", "judge.endpoint.model=judge") if server else ()
    return fork("evaluate", *arguments("evaluate", f"output={tmp_path}/out", *where, *settings, preset=preset))


def scores(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "scores.json").read_text())


def values(tmp_path, group: str) -> dict[str, float]:
    return {metric: e["value"] for metric, e in scores(tmp_path)["scores"][group].items()}


def names(line: str, *parts: str) -> None:
    """The line names all of these."""
    assert [] == [part for part in parts if part not in line], line


@pytest.fixture
def cfbench(shared_data, tmp_path) -> tuple[str, ...]:
    """The settings of a run over the first 20 rows of CFBench."""
    rows = json.loads((shared_data / "cfbench.json").read_text())[:20]
    answers = [{"prompt": row["prompt"], "response": f"<<{number}>>"} for number, row in enumerate(rows)]
    answers += [{"prompt": "Something else.", "response": "Yes."}]
    return (
        f"input={shared_data}/cfbench.json",
        "limit=20",
        f"responses={common.write_rows(tmp_path / 'responses.jsonl', answers[::-1])}",
    )


def test_twenty_rows_of_cfbench(cfbench, tmp_path):
    with Server(judge(CF_UNMET, CF_UNREADABLE)) as server:
        done = evaluate("cfbench", server, tmp_path, *cfbench, "judge.prompt_price=1").ok()
    assert len(server.asked) == 20
    # By the number of requirements: six whole ones, then 5/6 twice, 3/4 three times, 4/5, 3/5 and 2/3 twice, 8/9, and 0
    csr = (6 + 2 * 5 / 6 + 3 * 3 / 4 + 2 * 4 / 5 + 2 * 3 / 5 + 2 * 2 / 3 + 8 / 9 + 0) / 19
    # PSR: the six, and rows 3, 12 (2/3 of the secondary ones), 5 (5/7), 16 (3/4); not row 7, whose 3/5 gives 0.8
    assert values(tmp_path, "all") == pytest.approx({"CSR": csr, "ISR": 6 / 19, "PSR": 10 / 19})
    easy = {"CSR": (3 / 4 + 2 / 3 + 3 / 4 + 1 + 1) / 5, "ISR": 2 / 5, "PSR": 4 / 5}
    assert values(tmp_path, "easy") == pytest.approx(easy)
    assert scores(tmp_path)["scores"]["hard"]["CSR"]["n"] == 14
    report = scores(tmp_path)
    assert report["unreadable_by_fault"] == {"unparsable": 1}
    assert [row["number"] for row in report["unreadable_instructions"]] == [15]
    names(done.stderr, "judge: 20 calls for 20 instructions", "at your prices", "cfbench.json", "1 of 20 verdicts")
    names(done.stderr, "1 rows answer other prompts")
    assert done.stdout.endswith((tmp_path / "out" / "scores.md").read_text())
    names(done.stdout, "| all | 0.786 [", "num_unreadable_verdicts: 1")
    rows = common.read_rows(tmp_path / "out" / "verdicts.jsonl")
    assert rows[1]["verdict"] == [False] + [True] * 5 and rows[15]["verdict"] is None
    assert "MAYBE" in rows[15]["judge_answer"].upper() and rows[15]["where"].endswith("cfbench.json row 15")
    # The same command again asks nothing and says the same
    with Server(judge({}, None)) as server:
        again = evaluate("cfbench", server, tmp_path, *cfbench).ok()
    assert server.asked == [] and again.stdout.split("| model")[1:] == done.stdout.split("| model")[1:]


def test_twenty_rows_of_followbench(shared_data, tmp_path):
    rows = json.loads((shared_data / "followbench" / "style_constraints.json").read_text())[:24]
    answers = [
        {"prompt": row["instruction"], "response": f"<<{json.dumps([row['example_id'], row['level']])}>>"}
        for row in rows
        if row["level"]
    ]
    given = (
        f"input={shared_data}/followbench/style_constraints.json",
        "limit=24",  # four examples: level 0, which nobody answers, and five more
        f"responses={common.write_rows(tmp_path / 'responses.jsonl', answers)}",
    )
    with Server(judge(FOLLOW_UNMET, FOLLOW_UNREADABLE)) as server:
        evaluate("followbench", server, tmp_path, *given).ok()
    assert len(server.asked) == 20
    hard = {1: 3 / 4, 2: 2 / 4, 3: 2 / 3, 4: 3 / 4, 5: 2 / 4}
    soft = {1: 3 / 4, 2: 3 / 4, 3: (1 + 1 + 2 / 3) / 3, 4: 3.5 / 4, 5: 2.8 / 4}
    for level in range(1, 6):
        for group in ("all", "style"):
            found = values(tmp_path, f"{group}, level {level}")
            assert found == pytest.approx({"HSR": hard[level], "SSR": soft[level]}), level
    # 5, 1 and 0 levels one after the other; of the fourth example level 3 is not known
    assert values(tmp_path, "all") == pytest.approx({"CSL": 2.0})
    assert scores(tmp_path)["num_without_csl"] == 1 and scores(tmp_path)["num_initial"] == 4
    # The judge of level 3 sees the instructions of levels 0 to 3 and no more
    (prompt,) = [asked.prompt for asked in server.asked if "<<[1, 3]>>" in asked.prompt]
    assert [row["instruction"] in prompt for row in rows[:6]] == [True] * 4 + [False] * 2


def test_responses_of_a_model_and_rules(shared_data, tmp_path):
    """All of FollowBench's directory, the first example of each file; the endpoint that judges also answers."""
    gold = {
        row["instruction"]: row["answer"]
        for row in json.loads((shared_data / "followbench" / "example_constraints.json").read_text())[:5]
    }

    def script(asked):
        told = "\n".join(f"{n}: YES" for n in points(asked))
        return completion(asked, [told or gold.get(asked.prompt, "an answer")])

    with Server(script) as server:
        given = (f"endpoint.url={server.url}", "endpoint.model=writer", "limit=5")
        evaluate("followbench", server, tmp_path, f"input={shared_data}/followbench", *given).ok()
    assert values(tmp_path, "example") == {"CSL": 5.0}
    assert values(tmp_path, "situation, level 1") == {"HSR": 0.0, "SSR": 0.0}  # no "(A)" in the answer
    assert values(tmp_path, "style, level 4") == {"HSR": 1.0, "SSR": 1.0}
    assert "mixed, level 4" in scores(tmp_path)["scores"]  # though that row is called "format, content, content, ..."
    report = scores(tmp_path)
    assert report["num_instructions"] == 5 * 4 + 5 and report["num_ruled"] == 4 + 5
    assert sum(asked.body["model"] == "writer" for asked in server.asked) == 25
    assert len(server.asked) == 25 + report["num_judge_calls"] == 25 + 16


def test_questions_that_depend_on_each_other(tmp_path):
    question = [
        {"question": "Is it a poem?", "constraint_dimensions": ["Topic"], "composition_types": ["And"]},
        {"question": "Does it rhyme?", "constraint_dimensions": ["Style"], "dep": [0]},
        {"question": "In pairs?", "constraint_dimensions": ["Style"], "dep": [1]},
    ]
    rows = [{"instruction": f"Poem {i}.", "scoring_questions": question} for i in range(3)]
    rows[2]["scoring_questions"] = question[:1]
    given = (
        f"input={common.write_rows(tmp_path / 'bench.jsonl', rows)}",
        f"""responses={
            common.write_rows(
                tmp_path / "outputs.jsonl", [{"instruction": f"Poem {i}.", "output": f"<<{i}>>"} for i in range(3)]
            )
        }""",
    )
    with Server(judge({0: {1}, 1: {2}}, None)) as server:
        evaluate("complexbench", server, tmp_path, *given).ok()
    assert values(tmp_path, "questions") == pytest.approx({"met": 2 / 7})  # row 0 loses all, row 1 the last two
    assert values(tmp_path, "instructions") == pytest.approx({"all met": 1 / 3})
    assert values(tmp_path, "Topic") == values(tmp_path, "And") == pytest.approx({"met": 2 / 3})
    assert values(tmp_path, "Style") == pytest.approx({"met": 0.0})


def test_pairs_in_both_orders(tmp_path):
    theirs = [{"instruction": f"Do {i}.", "output": f"theirs {i}", "dataset": "d"} for i in range(6)]
    ours = [{"instruction": f"Do {i}.", "output": f"our output {i}", "generator": "x"} for i in range(6)]
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))
    (tmp_path / "ours.json").write_text(json.dumps(ours))

    def script(asked):
        row, first = int(re.search(r"Do (\d)", asked.prompt)[1]), asked.prompt.index("our output")
        ours_is = "A" if first < asked.prompt.index("theirs") else "B"
        other = {"A": "B", "B": "A"}[ours_is]
        told = {
            0: f"Verdict: {ours_is}",  # won
            1: f"**Verdict: {other}**",  # lost
            2: "verdict: tie.",
            3: "Verdict: A",  # whoever is first
            4: f"Final verdict: Response {ours_is}" if ours_is == "A" else "Verdict: TIE",
            5: "Verdict: A" if ours_is == "A" else "Both are good.",
        }
        return completion(asked, [f"A is long, B is short.\n\n{told[row]}"])

    with Server(script) as server:
        given = (f"input={tmp_path}/theirs.json", f"responses={tmp_path}/ours.json", "name=mine")
        evaluate("pairwise", server, tmp_path, *given).ok()
    assert len(server.asked) == 12
    assert values(tmp_path, "all") == pytest.approx({"win rate": (1 + 0 + 0.5 + 0.5 + 0.75) / 5, "inconsistent": 2 / 5})
    report = scores(tmp_path)
    assert (report["num_won"], report["num_lost"], report["num_unreadable_verdicts"]) == (1, 1, 1)
    assert (report["num_first_preferred"], report["num_second_preferred"]) == (5, 2)
    assert report["mean_characters"] == len("our output 0") and report["mean_characters_of_reference"] == 8
    outputs = json.loads((tmp_path / "out" / "outputs.json").read_text())
    assert outputs[3] == {"instruction": "Do 3.", "output": "our output 3", "generator": "mine", "dataset": "d"}


def test_killed_and_started_again(cfbench, tmp_path):
    script = judge(CF_UNMET, CF_UNREADABLE)

    def slow(asked):
        reply = script(asked)
        return type(reply)(reply.body, after=0.05)

    with Server(slow) as server:
        given = (f"output={tmp_path}/out", *cfbench, "judge.endpoint.model=judge", "judge.endpoint.concurrency=1")
        flags = arguments("evaluate", *given, f"judge.endpoint.url={server.url}", preset="cfbench")
        process = common.start("evaluate", *flags, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(server.asked) < 8:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        kept = (tmp_path / "out" / "judge_answers.jsonl.partial").read_text().count("\n")
        before = len(server.asked)
        fork("evaluate", *flags).ok()
        assert 6 <= kept < 20 and len(server.asked) - before == 20 - kept
    assert values(tmp_path, "all") == pytest.approx({"CSR": 14.938888889 / 19, "ISR": 6 / 19, "PSR": 10 / 19})


def test_a_judge_that_runs_here(tmp_path):
    """A random model answers and judges: nothing that it says is a verdict, and that is counted."""
    model = common.make_model(tmp_path / "model")
    rows = [{"prompt": f"Say {i}.", "criteria": [["short", "主需"], ["kind", "次需"]]} for i in range(3)]
    given = (
        f"input={common.write_rows(tmp_path / 'bench.jsonl', rows)}",
        f"model={model}",
        f"judge.model={model}",
        *("max_new_tokens=4", "judge.max_new_tokens=4", "decode.max_length=1024", "judge.decode.max_length=4096"),
        *("decode.slots=4", "judge.decode.slots=4", "max_failed_share=1.0"),
    )
    evaluate("cfbench", None, tmp_path, *given).ok()
    report = scores(tmp_path)
    assert report["num_unreadable_verdicts"] == report["num_judge_calls"] == 3 and report["scores"] == {}
    assert len(common.read_rows(tmp_path / "out" / "responses.jsonl")) == 3


def test_what_is_refused(tmp_path):
    rows = [
        {"prompt": "Say it.", "criteria": [["short", "主需"]]},
        {"prompt": "Sing it.", "criteria": [["loud", "次需"]]},
    ]
    bench = common.write_rows(tmp_path / "bench.jsonl", rows)
    answers = common.write_rows(tmp_path / "answers.jsonl", [{"prompt": "Say it.", "response": "<<0>>"}])

    def refused(*settings, preset="cfbench", server=None) -> str:
        return evaluate(preset, server, tmp_path, *settings).error()

    both = (f"input={bench}", f"responses={answers}")
    names(refused(*both, preset="cf"), "unknown preset 'cf'", "cfbench, followbench, complexbench, pairwise")
    names(refused(*both), "config.judge.model: not set", "--config.judge.endpoint.url")
    names(refused(f"input={bench}"), "config.responses: not set", "config.model")
    names(refused(*both, "model=x"), "leave one of the two out")
    names(
        refused(*both, "judge.model=x", "judge.endpoint.url=http://h/v1"), "config.judge.model='x'", "config.judge.end"
    )
    names(refused(*both, "judge.temperature=-1.0"), "config.judge.temperature=-1.0")
    names(refused(*both, "judge.prompt_price=-1.0"), "config.judge.prompt_price")
    names(refused(*both, "limit=0"), "config.limit=0")
    names(refused(*both, "judge.nothing=0"), "unknown key")
    with Server(judge({}, None)) as server:
        line = refused(*both, server=server)
        names(
            line, "answers.jsonl", "1 of 2 prompts have no response", "bench.jsonl row 1", "config.allow_missing=true"
        )
        names(refused(*both, "judge.endpoint.concurrency=0", "allow_missing=true", server=server), "config.judge.endp")
        done = evaluate("cfbench", server, tmp_path, *both, "allow_missing=true", "cost_only=true").ok()
        names(done.stderr, "judge: 1 calls for 2 instructions", "1 instructions have no response")
        assert server.asked == [] and not (tmp_path / "out").exists()
        evaluate("cfbench", server, tmp_path, *both, "allow_missing=true").ok()
        assert values(tmp_path, "all") == {"CSR": 1.0, "ISR": 1.0, "PSR": 1.0} and scores(tmp_path)["num_missing"] == 1
        common.write_rows(tmp_path / "answers.jsonl", [{"prompt": "Say it.", "response": "<<1>>"}])
        line = refused(*both, "allow_missing=true", server=server)
        names(line, "judge_answers.jsonl", "made with other questions", "give another output")
    (tmp_path / "file").write_text("")
    names(refused(*both, f"output={tmp_path}/file", "judge.model=x"), "is a file", "config.output a directory")
