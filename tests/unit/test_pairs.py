"""The construction of pairs around a scripted model that reacts to its prompts: what goes in is seen to come out."""

import hashlib
import json
import random
from types import SimpleNamespace

import pytest

from configs.musc_pairs import get_config
from lm_jax.config import from_config_dict
from lm_jax.data.messages import split_arguments
from lm_jax.data.rows import write_jsonl
from lm_jax.errors import UserError
from lm_jax.generation.generator import Local
from musc_jax.pairs import command
from musc_jax.pairs.command import PairsConfig, make_pairs
from musc_jax.pairs.demonstrations import own_demonstrations
from musc_jax.pairs.prompts import SEPARATOR, STOP
from musc_jax.pairs.tasks import Task, read_tasks
from tests.strong_model import POINT, TASK, Scripted, core, cut, failed, manners, stage_of
from tests.unit.test_templates import encoder_of, published

MIXED = {"drop": 0.4, "substitute": 0.3, "negate": 0.3}
ORDER = ("decompose", "negate", "recombine", "check", "respond")
THINGS = "a kettle, two ferries, the harbour, an old radio, warm bread, some tulips, a narrow street, the tram".split(
    ", "
)
POINTS = (  # with few words in common, else one could not stand in for another
    "Close every paragraph by asking readers something about {}",
    "Keep it under {} hundred words without counting titles",
    "Use no exclamation marks, emoji or capitals after section {}",
    "Quote {} lines from a poet who lived in Lisbon",
    "Let two strangers argue over {} cents before noon",
    "Number your steps from {} downwards and skip primes",
    "Name one animal, one tool and {} colours somewhere",
    "Avoid past tense entirely except inside chapter {}",
)


def instructions(number: int = 12) -> list[dict]:
    """Of three to six sentences, no two alike; every third with an input."""
    rows = []
    for i in range(number):
        draw = random.Random(i)
        points = [point.format(draw.randrange(900)) for point in draw.sample(POINTS, 2 + i % 4)]
        row = {"id": f"r{i}", "instruction": ". ".join([f"Write letter {i} to {draw.choice(THINGS)}", *points]) + "."}
        rows.append(row | ({"input": f"Notes {i}: see the file {draw.random()}"} if i % 3 == 0 else {}))
    return rows


@pytest.fixture
def pairs(tmp_path, capsys):
    """pairs(rows, model, **settings): the pairs, the dropped rows and the counts. `rows` None: none are given."""

    def call(rows=(), model=None, name="pairs", **settings):
        rows = instructions() if rows == () else rows
        if rows is not None:
            write_jsonl(f"{tmp_path}/in.jsonl", rows)
            settings["input"] = f"{tmp_path}/in.jsonl"
        output = tmp_path / name / "out.jsonl"
        config = get_config()
        config.update({"output": str(output), "seed": 3, **settings})
        given = None if model == "config's" else model or Scripted()
        make_pairs(from_config_dict(PairsConfig, config.to_dict()), given)
        return (*(_lines(f"{output}{end}") for end in ("", ".dropped.jsonl")), counts_of(output))

    return call


def _lines(path) -> list[dict]:
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def counts_of(output) -> dict:
    """The counts, after they were seen to add up with the files."""
    (counts,) = _lines(f"{output}.counts.json")
    dropped = _lines(f"{output}.dropped.jsonl")
    assert counts["input"] == counts["pairs"] + counts["dropped"] and counts["dropped"] == len(dropped)
    remaining = counts["input"]
    for stage in counts["stages"]:
        assert stage["rows"] == remaining and stage["dropped"] == sum(stage["reasons"].values()) > 0
        for reason, count in stage["reasons"].items():
            assert count == sum((d["stage"], d["reason"]) == (stage["stage"], reason) for d in dropped)
        remaining -= stage["dropped"]
    assert remaining == counts["pairs"]
    return counts


def content(side) -> str:
    (message,) = side
    return message["content"]


def joined(constraints, input: str) -> str:
    """The instruction that the scripted model makes of constraints."""
    return ". ".join(map(core, constraints)) + "." + (f"\n\n{input}" if input else "")


def reasons(counts: dict) -> dict:
    return {stage["stage"]: stage["reasons"] for stage in counts["stages"]}


def assert_valid(row: dict) -> None:
    assert list(row) == [
        *("id", "prompt", "chosen", "rejected", "constraints", "perturbed_constraints", "perturbations"),
        *("original_instruction", "input", "perturbed_prompt"),
    ]
    roles = {"prompt": "user", "perturbed_prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    for name, role in roles.items():
        assert [message["role"] for message in row[name]] == [role] and content(row[name]).strip()
    assert row["chosen"] != row["rejected"] and row["prompt"] != row["perturbed_prompt"]
    assert [edit["old"] for edit in row["perturbations"]] == row["constraints"]
    assert [edit["new"] for edit in row["perturbations"] if edit["new"]] == row["perturbed_constraints"]
    assert row["perturbations"][0]["kind"] == "kept" and {"kept"} < {edit["kind"] for edit in row["perturbations"]}


# --- what comes out --------------------------------------------------------------------------------------------------


def test_one_instruction(pairs):
    row = {"id": 7, "prompt": "Write a poem on tea. Rhyme every line. Use ten lines.", "input": "The tea is green."}
    (pair,), dropped, counts = pairs([row])
    assert_valid(pair)
    gone = next(edit["index"] for edit in pair["perturbations"] if edit["kind"] == "dropped")
    points = ["Write a poem on tea", "Rhyme every line", "Use ten lines"]
    less = [point for i, point in enumerate(points) if i != gone]
    assert pair["id"] == 7 and pair["input"] == "The tea is green." and gone in (1, 2)
    assert pair["constraints"] == [TASK + points[0] + "?", *(POINT + point + "?" for point in points[1:])]
    assert content(pair["prompt"]) == pair["original_instruction"] == ". ".join(points) + ".\n\nThe tea is green."
    assert content(pair["perturbed_prompt"]) == ". ".join(less) + ".\n\nThe tea is green."
    for side, asked in (("chosen", points), ("rejected", less)):
        told = "".join(f"\n- done: {point}" for point in [*asked, "The tea is green"])
        assert content(pair[side]) == f"{len(asked) + 1} points.{told}"
    assert dropped == [] and counts == {"input": 1, "pairs": 1, "dropped": 0, "stages": [], "left_out": {}}


@pytest.mark.parametrize("perturb", [{"drop": 1.0}, MIXED, {"drop": 0.0, "negate": 1.0}])
def test_every_pair_follows_from_its_constraints(pairs, perturb):
    rows = instructions(40)
    made, _, counts = pairs(rows, perturb=perturb, verify=True)
    assert [pair["id"] for pair in made] == [row["id"] for row in rows] and counts["pairs"] == 40
    kinds = set()
    for pair in made:
        assert_valid(pair)
        assert content(pair["prompt"]) == joined(pair["constraints"], pair["input"])
        assert content(pair["perturbed_prompt"]) == joined(pair["perturbed_constraints"], pair["input"])
        for edit in pair["perturbations"]:
            kinds.add(edit["kind"])
            assert (core(edit["old"]) in content(pair["chosen"])) and (
                edit["kind"] in ("kept", "negated") or core(edit["old"]) not in content(pair["rejected"])
            )
            if edit["kind"] in ("substituted", "negated"):
                assert core(edit["new"]) in content(pair["perturbed_prompt"]) and edit["new"] != edit["old"]
                assert core(edit["new"]) in content(pair["rejected"]) and core(edit["new"]) not in content(
                    pair["chosen"]
                )
    named = {"drop": "dropped", "substitute": "substituted", "negate": "negated"}
    assert kinds == {"kept", *(named[name] for name, share in perturb.items() if share)}


def test_original_instruction(pairs):
    model = Scripted()
    rows = [row | {"instruction": f"Please! {row['instruction']}"} for row in instructions()]
    made, _, _ = pairs(rows, model, full_instruction="original")
    assert [content(pair["prompt"]) for pair in made] == [
        Task(0, r["instruction"], r.get("input", "")).text for r in rows
    ]
    asked = {request.id: request.prompt for request in model.requests if "/recombine" in request.id}
    assert sorted(asked) == sorted(f"{row['id']}/recombine/perturbed" for row in rows)
    for row in rows:  # the last example is the row itself: what is asked for is an edit of its words
        *_, question, answer, _ = asked[f"{row['id']}/recombine/perturbed"]
        assert answer["content"] == f"Instruction:\n{row['instruction']}"
        assert (row.get("input") or "None") in question["content"]


def test_self_instruct(pairs):
    made, dropped, counts = pairs(None, num_instructions=30, num_examples=2)
    assert counts["input"] == 30 and counts["pairs"] > 20 and not {*reasons(counts)} - {"self_instruct", "recombine"}
    for pair in made:
        assert_valid(pair)
        assert content(pair["prompt"]) == pair["original_instruction"] and 4 <= len(pair["constraints"]) <= 8
    fewer, _, _ = pairs(None, name="fewer", num_instructions=9, num_examples=2)
    assert fewer == [pair for pair in made if pair["id"] < 9]  # a row does not depend on how many there are


def test_material_of_the_models_own_tasks(pairs):
    """No constraint holds it, so it is looked for, and both sides get it."""
    material = "Ledger: nine coins, four keys."
    model = Scripted(lambda t, a: f"{t}\n\n{material}" if stage_of(a) == "self_instruct" and a.body["seed"] % 2 else t)
    made, _, counts = pairs(None, model, num_instructions=20)
    asked = {r.id.split("/")[0] for r in model.requests if "/decompose" in r.id}
    assert counts["pairs"] > 12 and 3 < len(asked) < 17
    for pair in made:
        given = material if str(pair["id"]) in asked else ""
        assert pair["input"] == given and content(pair["prompt"]) == joined(pair["constraints"], given)
        assert content(pair["perturbed_prompt"]) == joined(pair["perturbed_constraints"], given)


def test_raw_text(pairs):
    model = Scripted()
    made, _, counts = pairs(model=model, format="text", text_template="Q: {instruction}\nA:", perturb=MIXED)
    assert counts["pairs"] == 12 and all(isinstance(request.prompt, str) for request in model.requests)
    for pair in made:
        assert pair["prompt"] == f"Q: {joined(pair['constraints'], pair['input'])}\nA:"
        assert pair["perturbed_prompt"] == f"Q: {joined(pair['perturbed_constraints'], pair['input'])}\nA:"
        assert isinstance(pair["chosen"], str) and isinstance(pair["rejected"], str)
    assert [sampling.stop for sampling in model.samplings] == [STOP, STOP, STOP, (*STOP, "\nQ:")]
    assert all(f"\n\n{SEPARATOR}\n\n" in r.prompt for r in model.requests if "/respond/" not in r.id)


def test_what_the_model_is_asked(pairs):
    model = Scripted()
    pairs(model=model, verify=True, perturb=MIXED, system=False, respond={"temperature": 0.9, "max_new_tokens": 77})
    assert len({request.id for request in model.requests}) == len(model.requests)
    assert [(s.temperature, s.max_new_tokens, s.seed, s.stop) for s in model.samplings] == [
        *((0.1, n, 3, ()) for n in (1024, 128, 512)),
        *((0.0, 256, 3, ()), (0.9, 77, 3, ())),
    ]
    examples, given = [], {row["id"]: row.get("input") for row in instructions()}
    for request in model.requests:
        assert [m["role"] for m in request.prompt] == ["user", "assistant"] * (len(request.prompt) // 2) + ["user"]
        if "/recombine/" in request.id:
            examples.append(json.dumps(request.prompt[:-1]))
            material = given[request.id.split("/")[0]]
            assert request.prompt[-1]["content"].startswith(f"Input:\n{material or 'None'}\n\nConstraints:\n1. ")
    assert len(examples) == 24 and len({*examples}) == 1  # both sides of every row have the same


def test_rows_do_not_depend_on_their_order(pairs):
    settings = {"perturb": MIXED, "near_duplicate": 0.0}
    made, _, _ = pairs(instructions(30), **settings)
    mixed, _, _ = pairs(random.Random(0).sample(instructions(30), 30), name="mixed", **settings)
    assert sorted(map(json.dumps, made)) == sorted(map(json.dumps, mixed)) and made != mixed
    other, _, _ = pairs(instructions(30), name="other", seed=4, **settings)
    assert [p["perturbed_constraints"] for p in other] != [p["perturbed_constraints"] for p in made]


def test_loads_with_datasets_and_into_training(pairs, tmp_path):
    import datasets

    from lm_jax.data.text import TextEncoder
    from lm_jax.data.tokenizers import load_tokenizer
    from musc_jax.training.examples import load_pairs
    from tests.checkpoints import make_tokenizer

    made, _, _ = pairs(perturb=MIXED)
    path = f"{tmp_path}/pairs/out.jsonl"
    table = datasets.load_dataset("json", data_files=path, split="train", cache_dir=f"{tmp_path}/cache")
    assert table.to_list() == made
    make_tokenizer(tmp_path / "model")
    encoder = TextEncoder(load_tokenizer(f"{tmp_path}/model"), 4096)
    loaded = load_pairs(path, encoder, "uniform")
    assert len(loaded) == len(made) and [row.id for row in loaded.rows] == [pair["id"] for pair in made]
    assert [(row.prompt, row.chosen, row.rejected) for row in loaded.rows] == [
        (pair["prompt"], pair["chosen"], pair["rejected"]) for pair in made
    ]


@pytest.mark.parametrize("format", ["messages", "text"])
def test_trl_takes_the_file(pairs, tmp_path, format):
    """Its DPOTrainer sees the same tokens as our encoder."""
    pairs(instructions(4), format=format)
    assert_trl_sees_the_same(tmp_path, f"{tmp_path}/pairs/out.jsonl")


def assert_trl_sees_the_same(directory, path) -> None:
    import datasets
    import transformers
    import trl

    from lm_jax.data.text import TextEncoder
    from lm_jax.data.tokenizers import load_tokenizer
    from tests.checkpoints import make_checkpoint, make_tokenizer

    model = f"{directory}/model"
    make_checkpoint(model, "llama", max_position_embeddings=2048)
    make_tokenizer(model)
    trainer = trl.DPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(model),
        args=trl.DPOConfig(output_dir=f"{directory}/trl", max_length=None, bf16=False, use_cpu=True, report_to="none"),
        train_dataset=datasets.load_dataset("json", data_files=path, split="train", cache_dir=f"{directory}/cache"),
        processing_class=transformers.AutoTokenizer.from_pretrained(model),
    )
    rows, encoder = list(trainer.train_dataset), TextEncoder(load_tokenizer(model), 2048)
    for row, pair in zip(rows, _lines(path), strict=True):
        for side in ("chosen", "rejected"):
            ours = encoder.encode(pair["prompt"], pair[side], "row")
            theirs = [*row["prompt_ids"], *row[f"{side}_ids"]]
            both = [*ours.prompt_ids.tolist(), *ours.response_ids.tolist()]
            # TRL trains on what the template sets after the end token as well
            assert theirs[: len(both)] == both and len(theirs) - len(both) <= 1


# --- what does not ---------------------------------------------------------------------------------------------------


def only(stage: str, change):
    """A change at one stage alone."""
    return Scripted(lambda text, asked: change(text, asked) if stage_of(asked) == stage else text)


def assert_all_dropped(pairs, tmp_path, model, stage: str, reason: str, **settings) -> list[dict]:
    """Every row leaves at the stage for the reason, and the error says so."""
    with pytest.raises(UserError, match=rf"^no pair left: of 12 rows all were dropped, 12 {reason} \({stage}\)"):
        pairs(model=model, max_failed_share=1.0, **settings)
    output = tmp_path / "pairs" / "out.jsonl"
    assert reasons(counts_of(output)) == {stage: {reason: 12}} and not output.exists()
    return _lines(f"{output}.dropped.jsonl")


@pytest.mark.parametrize(
    ("stage", "change", "reason"),
    [
        ("decompose", lambda t, a: "", "empty"),
        ("decompose", lambda t, a: "I'm sorry, but I can't help with that.", "refusal"),
        ("decompose", lambda t, a: cut(t[:40]), "truncated"),
        ("decompose", lambda t, a: failed(), "no_answer"),
        ("decompose", lambda t, a: "1. Is it good?", "too_few_constraints"),
        ("recombine", lambda t, a: "", "empty"),
        ("recombine", lambda t, a: "Write a text that will do.", "identical_instructions"),
        ("recombine", lambda t, a: a.prompt.split("Constraints:\n")[1], "echo"),
        ("recombine", lambda t, a: failed(), "no_answer"),
        ("check", lambda t, a: t.replace("yes", "no"), "lost_constraint"),
        ("check", lambda t, a: t.replace("no", "yes"), "kept_constraint"),
        ("check", lambda t, a: "Fine!", "unparsable"),
        ("respond", lambda t, a: " \n", "empty_response"),
        ("respond", lambda t, a: "Here you go.", "identical_pair"),
        ("respond", lambda t, a: f"I cannot help with that. {t}", "refusal"),
        ("respond", lambda t, a: cut(t), "truncated"),
        ("respond", lambda t, a: f"<think>{t}", "truncated"),
        ("respond", lambda t, a: a.prompt, "echo"),
        ("respond", lambda t, a: failed(), "no_answer"),
    ],
)
def test_a_fault_at_a_stage(pairs, tmp_path, stage, change, reason):
    for row in assert_all_dropped(pairs, tmp_path, only(stage, change), stage, reason, verify=True):
        reached = ORDER.index(stage)
        assert (row["constraints"] is not None) == (reached > 0) and (row["prompt"] is not None) >= (reached > 2)
        assert (row["error"] is not None) == (reason == "no_answer") and row["original_instruction"]
        assert row["answer"] is None or isinstance(row["answer"], str)


def test_a_lost_constraint_is_seen(pairs):
    """The recombined instruction of every other row asks for less than its constraints."""

    def forget(text, asked):
        head, _, _ = text.rpartition(". ")
        return f"{head}." if int(hashlib.sha256(text.encode()).hexdigest(), 16) % 2 else text

    kept, dropped, counts = pairs(instructions(40), only("recombine", forget), verify=True)
    assert 5 < len(kept) < 35 and {*reasons(counts)} <= {"check", "recombine"}
    assert reasons(counts)["check"]["lost_constraint"] > 5
    for pair in kept:
        assert content(pair["prompt"]) == joined(pair["constraints"], pair["input"])


def test_negations_that_will_not_do_drop_the_constraint(pairs):
    made, _, _ = pairs(
        model=only("negate", lambda t, a: failed()), perturb={"drop": 0.0, "negate": 1.0}, max_failed_share=1
    )
    edits = [edit for pair in made for edit in pair["perturbations"] if edit["kind"] != "kept"]
    assert len(made) == 12 and {(edit["kind"], edit["planned"]) for edit in edits} == {("dropped", "negated")}


def test_thoughts_are_no_part_of_a_response(pairs):
    plain, _, _ = pairs()
    thought, _, _ = pairs(model=Scripted(lambda t, a: f"<think>\nhm\n</think>\n\n{t}\n"), name="thought")
    assert thought == plain


def test_blank_and_repeated_instructions(pairs):
    rows = instructions(4)
    rows += [
        {"id": "blank", "instruction": " "},
        rows[1] | {"id": "again"},
        {"id": "n", "prompt": rows[1]["instruction"]},
    ]
    made, dropped, counts = pairs(rows)
    assert reasons(counts) == {"input": {"near_duplicate": 2, "empty": 1}} and len(made) == 4
    assert [row["id"] for row in dropped] == ["blank", "again", "n"]
    made, _, counts = pairs(rows, name="all", near_duplicate=0.0)
    assert counts["pairs"] == 6


@pytest.mark.parametrize("manner", manners())
def test_malformed_manners(pairs, tmp_path, manner):
    """Of all answers, and of every other one: nothing but counted drops and valid rows."""
    settings = {"max_failed_share": 1.0, "verify": True, "perturb": MIXED}
    change = manners()[manner]
    try:
        made, _, _ = pairs(model=Scripted(change), **settings)
        assert manner in ("wrong language", "rambling")
    except UserError as error:
        made = []
        assert str(error).startswith("no pair left: of 12 rows") and counts_of(tmp_path / "pairs" / "out.jsonl")
    some = Scripted(lambda t, a: change(t, a) if a.body["seed"] % 8 == 0 else t)
    more, _, counts = pairs(instructions(40), some, name="some", **settings)
    assert 0 < counts["pairs"] <= 40
    for pair in made + more:
        assert_valid(pair)


def test_too_many_failures(pairs, tmp_path):
    model = only("respond", lambda t, a: failed() if a.number % 2 else t)
    with pytest.raises(UserError, match=r"respond.jsonl.partial stay|HTTP 400"):
        pairs(model=model)
    assert not (tmp_path / "pairs" / "out.jsonl").exists()
    made, _, counts = pairs()  # the stages that are done are not done again
    assert counts["pairs"] == 12


# --- stopped and called again ----------------------------------------------------------------------------------------


def test_stopped_after_every_few_answers(pairs, tmp_path):
    settings = {"verify": True, "perturb": MIXED}
    pairs(name="whole", **settings)
    asked = []
    for _ in range(100):
        model = Scripted(stop_after=7)
        try:
            pairs(model=model, **settings)
            break
        except UserError as error:
            assert "went away" in str(error)
        finally:
            asked += [request.id for request in model.requests]
    assert len(asked) > 84 and len({*asked}) == len(asked)  # none was asked twice
    for end in ("", ".counts.json", ".dropped.jsonl"):
        assert (tmp_path / f"pairs/out.jsonl{end}").read_bytes() == (tmp_path / f"whole/out.jsonl{end}").read_bytes()
    kept = {path.name for path in (tmp_path / "pairs/out.jsonl.stages").iterdir()}
    assert kept == {f"{stage}.jsonl{end}" for stage in ORDER for end in ("", ".run.json")}


def test_a_finished_run(pairs, tmp_path, capsys):
    made, _, _ = pairs()
    told = capsys.readouterr().out
    before = (tmp_path / "pairs/out.jsonl").stat().st_mtime_ns
    model = Scripted()
    assert pairs(model=model)[0] == made and not model.requests
    assert capsys.readouterr().out == told and before == (tmp_path / "pairs/out.jsonl").stat().st_mtime_ns
    for changed, part in (
        ({"seed": 4}, "config.seed=3, now 4"),
        ({"perturb": {"ratio": 0.5}}, "config.perturb.ratio=0.3, now 0.5"),
        ({"rows": instructions(13)}, "fingerprint of config.input="),
    ):
        with pytest.raises(UserError, match=f"out.jsonl: made with {part}"):
            pairs(**changed)


def test_other_settings_of_a_run_that_was_stopped(pairs):
    """What no finished stage has read may change, nothing else."""
    with pytest.raises(UserError, match="went away"):
        pairs(model=Scripted(stop_after=20))  # 12 decompositions, some recombinations
    for changed, part in (
        ({"decompose": {"temperature": 0.3}}, "decompose.jsonl: made with config.decompose.temperature=0.1, now 0.3"),
        ({"num_examples": 3}, "decompose.jsonl: made with config.num_examples=4, now 3"),
        (
            {"perturb": {"ratio": 0.9}},
            "recombine.jsonl.run.json: this run was begun with config.perturb.ratio=0.3, now",
        ),
        ({"full_instruction": "original"}, 'config.full_instruction="recombined", now "original"'),
        ({"rows": instructions(11)}, "decompose.jsonl: made with fingerprint of config.input="),
    ):
        with pytest.raises(UserError, match=part):
            pairs(**changed)
    model = Scripted()
    pairs(model=model, respond={"temperature": 0.6, "max_new_tokens": 99}, verify=True, max_failed_share=0.5)
    assert {request.id.split("/")[1] for request in model.requests} == {"recombine", "check", "respond"}


def test_a_stage_that_was_tampered_with(pairs, tmp_path):
    with pytest.raises(UserError, match="went away"):
        pairs(model=Scripted(stop_after=20))
    path = tmp_path / "pairs/out.jsonl.stages/decompose.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match="decompose.jsonl: no longer has the rows"):
        pairs()
    path.unlink()
    model = Scripted()
    assert pairs(model=model)[2]["pairs"] == 12 and sum("/decompose" in r.id for r in model.requests) == 12


# --- settings and input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"num_examples": 0}, "config.num_examples=0"),
        ({"num_examples": 1, "verify": True}, "config.num_examples=1: must be at least 1, and 2 with config.verify"),
        ({"num_examples": 99}, "config.num_examples: 99 in-context examples"),
        ({"seed": -1}, "config.seed=-1"),
        ({"format": "chat"}, "config.format='chat'"),
        ({"text_template": "no"}, "config.text_template='no': must be a text with {instruction}"),
        ({"full_instruction": "both"}, "config.full_instruction='both'"),
        ({"near_duplicate": 1.5}, "config.near_duplicate=1.5"),
        ({"max_failed_share": -1.0}, "config.max_failed_share=-1.0"),
        ({"respond": {"temperature": -1.0}}, "config.respond.temperature=-1.0"),
        ({"check": {"max_new_tokens": 0}}, "config.check.max_new_tokens=0"),
        ({"perturb": {"ratio": 2.0}}, "config.perturb.ratio=2.0"),
        ({"perturb": {"drop": 0.5}}, "config.perturb: drop=0.5"),
        ({"num_instructions": 5}, "config.num_instructions=5: instructions come from a file or are invented"),
        ({"examples": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"output": ""}, "output: empty"),
        ({"output": "pairs.parquet"}, "ends in .jsonl"),
    ],
)
def test_settings(pairs, tmp_path, settings, part):
    model = Scripted()
    with pytest.raises(UserError) as raised:
        pairs(model=model, **settings)
    assert part in str(raised.value) and not model.requests
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_examples_of_the_users(pairs, tmp_path):
    own = [{"instruction": f"Own task {i}.", "decomposed_questions": [f"Own {i}?", f"More {i}?"]} for i in range(3)]
    write_jsonl(f"{tmp_path}/own.jsonl", own)
    model = Scripted()
    pairs(model=model, examples=f"{tmp_path}/own.jsonl", num_examples=3)
    shown = json.dumps([r.prompt for r in model.requests if "/decompose" in r.id])
    assert all(row["instruction"] in shown for row in own)
    assert not any(d.instruction in shown for d in own_demonstrations())


def test_reading_tasks(tmp_path):
    message = [{"role": "user", "content": "c"}]
    rows = [
        {"prompt": "a", "input": None, "other": 1},
        {"instruction": "b", "input": "with", "id": None},
        {"prompt": message, "instruction": "x", "id": 9},
    ]
    write_jsonl(f"{tmp_path}/a.jsonl", rows)
    assert read_tasks(f"{tmp_path}/a.jsonl")[0] == [Task(0, "a"), Task(1, "b", "with"), Task(9, "c")]
    write_jsonl(f"{tmp_path}/a.jsonl", [*rows, {"prompt": "d", "id": "x"}])
    assert [task.id for task in read_tasks(f"{tmp_path}/a.jsonl")[0]] == ["0", "1", "9", "x"]


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (
            {"text": "a"},
            [
                "a.jsonl row 1",
                "none of prompt, instruction, question",
                "it has text",
                '--config.columns="instruction=..."',
            ],
        ),
        ({"prompt": None}, ["none of prompt"]),
        ({"prompt": "a", "system": "b"}, ["has system, and pairs are made of an instruction alone", "system="]),
        ({"prompt": "a", "history": [["b", "c"]]}, ["has history"]),
        ({"prompt": 5}, ["a.jsonl row 1", "prompt must be a string, got int"]),
        ({"prompt": "a", "input": ["b"]}, ["input must be a string, got list"]),
        ({"prompt": []}, ["prompt is an empty list"]),
        (
            {"prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]},
            ["system, user", "one user"],
        ),
        ({"prompt": "a", "id": 0}, ["a.jsonl row 1", "same id 0 as row 0"]),
        ({"prompt": "a", "id": ""}, ["id must be"]),
        ({"prompt": "a", "id": 1.5}, ["id must be"]),
    ],
)
def test_rows_that_are_no_tasks(tmp_path, row, parts):
    write_jsonl(f"{tmp_path}/a.jsonl", [{"prompt": "a"}, row])
    with pytest.raises(UserError) as raised:
        read_tasks(f"{tmp_path}/a.jsonl")
    assert [] == [part for part in parts if part not in str(raised.value)], raised.value


def test_the_table(pairs, capsys):
    rows = [{"prompt": ""}, {"prompt": "Too short"}, *instructions(3), {"prompt": " "}]
    pairs(rows)
    assert capsys.readouterr().out == (
        "stage      rows  dropped  reason\n"
        "input         6        2  2 empty\n"
        "decompose     4        1  1 too_few_constraints\n"
        "pairs         3        3  of 6 rows\n"
    )


# --- chat templates and thoughts -------------------------------------------------------------------------------------


def test_a_rows_template_arguments_go_with_all_that_is_asked_about_it(pairs):
    rows, kwargs = instructions(6), {"enable_thinking": False}
    rows[2]["chat_template_kwargs"] = kwargs
    rows[3]["chat_template_kwargs"] = json.dumps(kwargs)
    model = Scripted()
    made, _, _ = pairs(rows, model, verify=True)
    found = {row["id"]: row.get("chat_template_kwargs") for row in made}
    assert found == {f"r{i}": kwargs if i in (2, 3) else None for i in range(6)}
    for request in model.requests:
        own, _ = split_arguments(request.prompt)
        assert own == (found[request.id.split("/")[0]] or {})
    assert len({request.id.split("/")[1] for request in model.requests}) == 4
    with pytest.raises(UserError, match="in.jsonl row 0: chat_template_kwargs: must be a JSON object"):
        pairs([{"instruction": "Write.", "chat_template_kwargs": "no"}], name="other")


@pytest.fixture
def thinker(monkeypatch):
    """A model here whose generation prompt opens thoughts, which its answers go on with."""
    tokenizer = encoder_of(published("deepseek_r1_distill"))[1]
    local = Local(SimpleNamespace(fingerprint="weights"), tokenizer, (1,), None)
    monkeypatch.setattr(command, "local_mesh", lambda config: "a mesh")
    monkeypatch.setattr(command, "open_local", lambda config, mesh: local)

    def answers_with(change):
        model = Scripted(change)
        monkeypatch.setattr(command, "load_local", lambda config, local: model)
        return model

    return answers_with


def test_thoughts_are_no_part_of_any_answer(pairs, thinker):
    """Lists, scores and verdicts in thoughts are none; what ends in the middle of them is no answer."""
    musing = (
        "1. Is it about tulips?\n2. Is it short?\nScore: 1\nI'm sorry, but I can't help with that.\n1: NO\n</think>\n\n"
    )
    thinker(lambda text, asked: musing + text)
    made, dropped, _ = pairs(model="config's")
    plain, *_ = pairs(name="plain")
    texts = [[row[k] for k in ("prompt", "chosen", "rejected", "constraints")] for row in made]
    assert texts == [[row[k] for k in ("prompt", "chosen", "rejected", "constraints")] for row in plain] and not dropped


@pytest.mark.parametrize("stage", ["decompose", "recombine", "respond"])
def test_thoughts_that_do_not_end(pairs, thinker, stage):
    """Though the answer shows no `<think>`, which stands in its prompt, and ends by itself."""

    def change(text, asked):
        broken = stage_of(asked) == stage and "letter 4" in json.dumps(asked.body["messages"])
        return text if broken else f"hm</think>\n\n{text}"

    thinker(change)
    made, dropped, _ = pairs(model="config's")
    assert [(row["id"], row["stage"], row["reason"]) for row in dropped] == [("r4", stage, "truncated")]
    assert len(made) == 11
