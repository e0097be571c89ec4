"""Filtering candidates as a user does it; killed, continued, chosen from anew, and what is refused."""

import json
import shutil
import signal
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import transformers
import trl
from safetensors.numpy import load_file, save_file

from lm_jax.data.supervised import load_supervised
from lm_jax.data.text import TextEncoder
from lm_jax.data.tokenizers import load_tokenizer
from tests.checkpoints import make_tokenizer
from tests.e2e import common
from tests.e2e.common import Fork, arguments, fork, run

SMALL = ("max_length=200", "batch.row_length=256", "batch.rows=2")


def candidate(i, **more):
    """Three a response, on two subjects in turn."""
    return {
        "id": f"r{i // 3}",
        "response": f"{i // 3} cats sat on the hat and the mat"[: 12 + i // 3],
        "instruction": f"say that {i} cats sat on the hat",
        "subject": "ab"[i // 3 % 2],
        **more,
    }


class Place:
    def __init__(self, path: Path):
        self.path = path
        self.forward = common.make_model(path / "forward", max_position_embeddings=256)
        self.reverse = common.make_model(path / "reverse", max_position_embeddings=256, seed=1)
        self.rows = [candidate(i) for i in range(30)]
        self.rows[4] |= {"instruction": None}
        self.rows[7] |= {"instruction": " \n"}
        self.rows[9] |= {"instruction": "say " * 200}
        self.input = common.write_rows(path / "candidates.jsonl", self.rows)

    def flags(self, name: str, *settings: str) -> list[str]:
        """Later settings win."""
        given = (f"forward={self.forward}", f"reverse={self.reverse}", f"input={self.input}")
        return arguments("main_filter", *given, f"output={self.path / name}.jsonl", *SMALL, *settings, preset="tiny")

    def filter(self, name: str, *settings: str, **options) -> str:
        """What the command prints."""
        return fork("main_filter", *self.flags(name, *settings), **options).ok().stdout

    def refused(self, name: str, *settings: str) -> str:
        """The line of the error; nothing was kept."""
        line = fork("main_filter", *self.flags(name, *settings)).error()
        assert not (self.path / f"{name}.jsonl").exists()
        return line

    def kept(self, name: str) -> list[dict]:
        return common.read_rows(f"{self.path / name}.jsonl")

    def candidates(self, name: str) -> list[dict]:
        return common.read_rows(f"{self.path / name}.jsonl.candidates.jsonl")

    def report(self, name: str) -> dict:
        return json.loads(Path(f"{self.path / name}.jsonl.report.json").read_text())

    def scores(self, name: str) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (self.path / f"{name}.jsonl.scores").glob("*.jsonl")}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def filtered(place):
    """(what was printed, what was said)."""
    done = run("main_filter", *place.flags("kept")).ok()
    return done.stdout, done.stderr


def test_what_a_person_sees(place, filtered):
    printed, said = filtered
    report, rows, kept = place.report("kept"), place.candidates("kept"), place.kept("kept")
    assert "candidates.jsonl: 30 candidates for 10 responses" in said
    assert [line.split("  ")[0] for line in said.splitlines() if "left 0s" in line] == [
        "response 30/30",
        "response alone 10/10",
        "instruction 30/30",
    ]
    assert "kept 5 of 10 responses (30 candidates) by mutual_gain" in printed
    assert report["dropped"] == {"no_instruction": 2, "too_long": 1, "worse_candidate": 17, "beyond_fraction": 5}
    assert {row["reason"] for row in rows} == {None, *report["dropped"]}
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in place.rows]
    assert [row["subject"] for row in rows] == [row["subject"] for row in place.rows]
    for row in rows:
        assert (row["scores"] is None) == (row["reason"] in ("no_instruction", "too_long"))
        assert row["kept"] == (row["reason"] is None)
    # The kept ones have the lowest scores of their responses, and of all best ones the lower half
    best = {}
    for i, row in enumerate(rows):
        score = row["scores"]["mutual_gain"] if row["scores"] else np.inf
        if row["id"] not in best or score < best[row["id"]][0]:
            best[row["id"]] = score, i
    expected = sorted(i for _, i in sorted(best.values())[:5])
    assert [i for i, row in enumerate(rows) if row["kept"]] == expected
    assert [row["id"] for row in kept] == [place.rows[i]["id"] for i in expected]
    assert [row["instruction"] for row in kept] == [place.rows[i]["instruction"] for i in expected]
    system = "Answer as a text found on the web does."
    assert kept[0]["messages"] == [
        {"role": "system", "content": system},
        {"role": "user", "content": kept[0]["instruction"]},
        {"role": "assistant", "content": place.rows[expected[0]]["response"]},
    ]
    plots = sorted(p.name for p in (place.path / "kept.jsonl.plots").iterdir())
    assert plots == ["copy_rate.png", "forward_reverse.png", "kept_by_length.png", "scores.png"]


def test_a_rows_own_arguments_of_the_template(place, tmp_path):
    """Scores as with the key, for the rows that bring them."""
    models = []
    for path in (place.forward, place.reverse):
        copy = Path(shutil.copytree(path, tmp_path / Path(path).name))
        template = copy / "chat_template.jinja"
        template.write_text("{% if quiet %}the hat the hat{% endif %}" + template.read_text())
        models.append(copy)
    own = {"quiet": True}
    rows = [row | {"chat_template_kwargs": own} if row["id"] == "r0" else row for row in place.rows]
    given = common.write_rows(tmp_path / "own.jsonl", rows)
    flags = [f"forward={models[0]}", f"reverse={models[1]}", "fraction=1.0"]
    place.filter("own", *flags, f"input={given}")
    place.filter("without", *flags)
    place.filter("with_the_key", *flags, f"chat_template_kwargs={json.dumps(own)}")
    scores = ([r["scores"] or {} for r in place.candidates(n)] for n in ("own", "without", "with_the_key"))
    for row, found, without, with_the_key in zip(rows, *scores, strict=True):
        expected = with_the_key if row["id"] == "r0" else without
        assert found == pytest.approx(expected, abs=1e-4)  # packed in other rows
        assert not found or (row["id"] == "r0") != (found == pytest.approx(without, abs=1e-4))
    assert {row["id"] for row in place.kept("own") if row.get("chat_template_kwargs") == own} == {"r0"}


def test_loads_with_datasets_and_into_trl(place, filtered, tmp_path):
    """SFTTrainer sees the same tokens as our encoder."""
    path = f"{place.path}/kept.jsonl"
    table = datasets.load_dataset("json", data_files=path, split="train", cache_dir=f"{tmp_path}/cache")
    assert [row["messages"] for row in table.to_list()] == [row["messages"] for row in place.kept("kept")]
    trainer = trl.SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(place.forward),
        args=trl.SFTConfig(f"{tmp_path}/trl", max_length=None, bf16=False, use_cpu=True, report_to="none"),
        train_dataset=table,
        processing_class=transformers.AutoTokenizer.from_pretrained(place.forward),
    )
    encoder = TextEncoder(load_tokenizer(place.forward), 256)
    segments = load_supervised(path, encoder, "all", None).segments
    for row, ours in zip(trainer.train_dataset, segments, strict=True):
        both, theirs = [*ours.prompt.tolist(), *ours.response.tolist()], row["input_ids"]
        # TRL keeps what the template sets after the end token as well
        assert theirs[: len(both)] == both and len(theirs) - len(both) <= 1


@pytest.mark.slow
def test_another_choice_scores_nothing_anew(place, filtered):
    before = place.scores("kept")
    scores = f"scores={place.path}/kept.jsonl.scores"
    seen = set()
    for score in ("forward", "reverse", "mutual", "forward_gain"):
        done = fork("main_filter", *place.flags(score, scores, f"score={score}", "fraction=0.3")).ok()
        assert "left" not in done.stderr and "tok/s" not in done.stderr
        found = [row["scores"][score] for row in place.candidates(score) if row["scores"]]
        kept = [row["scores"][score] for row in place.kept(score)]
        assert len(kept) == 3 and min(kept) == min(found)
        seen.add(tuple(row["instruction"] for row in place.kept(score)))
        assert [r["scores"] for r in place.candidates(score)] == [r["scores"] for r in place.candidates("kept")]
    assert len(seen) > 1 and place.scores("kept") == before
    place.filter("again")  # from the start
    for name in ("", ".candidates.jsonl"):
        assert (
            Path(f"{place.path}/again.jsonl{name}").read_bytes() == Path(f"{place.path}/kept.jsonl{name}").read_bytes()
        )


def test_quota_and_threshold(place, filtered):
    scores = f"scores={place.path}/kept.jsonl.scores"
    place.filter("quota", scores, "cluster=subject", "fraction=0.4")
    subjects = [row["subject"] for row in place.candidates("quota") if row["kept"]]
    assert sorted(subjects) == ["a", "a", "b", "b"]
    best = sorted(
        r["scores"]["mutual_gain"] for r in place.candidates("kept") if r["reason"] in (None, "beyond_fraction")
    )
    place.filter("threshold", scores, "fraction=1", f"threshold={(best[3] + best[4]) / 2}")
    assert sorted(row["scores"]["mutual_gain"] for row in place.kept("threshold")) == best[:4]
    assert place.report("threshold")["dropped"]["over_threshold"] == 6
    line = place.refused("nothing", scores, "threshold=-100")
    assert "all candidates were filtered out: of 30 2 no_instruction, 1 too_long, 17 worse_candidate" in line
    assert "10 over_threshold" in line and "(the lowest mutual_gain is " in line and "raise config.threshold" in line


def test_killed_and_continued(place):
    """In every pass, twice in a row: the same bytes; what was there is not scored again."""
    rows = common.write_rows(place.path / "many.jsonl", [candidate(i) for i in range(120)])
    settings = (f"input={rows}", "batch.rows=1", "batch.row_length=200")
    place.filter("undisturbed", *settings)
    expected = place.scores("undisturbed")
    directory = place.path / "killed.jsonl.scores"
    for name in ("response", "response", "response_alone", "instruction"):
        killed = Fork("main_filter", *place.flags("killed", *settings))
        partial = directory / f"{name}.jsonl.partial"
        before = partial.stat().st_size if partial.exists() else 0
        while not partial.exists() or partial.stat().st_size <= before:
            assert killed.process.is_alive(), killed.wait().stderr
            time.sleep(0.0005)
        killed.process.kill()
        assert killed.wait().status == -signal.SIGKILL
        assert partial.exists() and not (place.path / "killed.jsonl").exists()
    done = fork("main_filter", *place.flags("killed", *settings)).ok()
    assert "response 120" not in done.stderr and "instruction 120/120" in done.stderr
    assert place.scores("killed") == expected
    for name in ("", ".candidates.jsonl"):
        mine, theirs = (Path(f"{place.path}/{run}.jsonl{name}") for run in ("killed", "undisturbed"))
        assert mine.read_bytes() == theirs.read_bytes()


def test_more_devices_give_the_same(place, filtered):
    place.filter("devices", "mesh.fsdp=2", "mesh.tensor=2", devices=4)
    for mine, theirs in zip(place.candidates("devices"), place.candidates("kept"), strict=True):
        assert mine["scores"] == (theirs["scores"] and pytest.approx(theirs["scores"], abs=2e-5))


def test_text_format(place):
    place.filter("text", "prompts.format=text")
    row = place.kept("text")[0]
    assert row["prompt"].startswith("Answer as a text found on the web does.\n\nInstruction:\nsay that")
    assert row["prompt"].endswith("\n\nResponse:\n") and "cats" in row["response"] and "messages" not in row


def test_settings_that_cannot_be(place):
    for settings, says in (
        (["fraction=0.0"], "config.fraction=0.0: must lie in (0, 1]"),
        (["fraction=1.5"], "config.fraction=1.5: must lie in (0, 1]"),
        (["score=best"], "config.score: unknown score 'best'; choose from forward"),
        (["max_length=300"], "config.max_length=300 must lie between 2 and config.batch.row_length=256"),
        (["prompts.reverse_question=What?"], "config.prompts.reverse_question: has the markers none"),
        ([f"input={place.path}/absent.jsonl"], "absent.jsonl: no such file"),
        (["reverse=nowhere/at/all"], "nowhere/at/all"),
        (["cluster=topic"], "candidates.jsonl row 0: column 'topic' is missing"),
    ):
        assert says in place.refused("wrong", *settings)
    line = fork("main_filter", *place.flags("wrong", f"output={place.path}/kept.txt")).error()
    assert "give config.output a name ending in .jsonl" in line
    line = fork("main_filter", *place.flags("wrong", f"output={place.input}")).error()
    assert "the input itself" in line


def test_rows_that_cannot_be(place, tmp_path):
    for rows, says in (
        ([], "the file is empty"),
        ([{"id": 1, "response": "a"}], "row 0: column 'instruction' is missing"),
        ([candidate(0), candidate(1, response="other")], "row 1: has the id of row 0 but another response"),
        ([candidate(0, response="")], "row 0: response must be a text that is not empty"),
        ([candidate(0, response="cat<|im_end|>")], "row 0: doubled EOS"),
    ):
        path = common.write_rows(tmp_path / "rows.jsonl", rows)
        assert says in place.refused("rows", f"input={path}", f"scores={tmp_path}/scores")
    # All too long, or without an instruction
    rows = [candidate(0, instruction=None), candidate(3, response="cat " * 300)]
    path = common.write_rows(tmp_path / "rows.jsonl", rows)
    line = place.refused("rows", f"input={path}", f"scores={tmp_path}/scores")
    assert "all candidates were filtered out: of 2 1 no_instruction, 1 too_long" in line and "config.max_length" in line


def test_models_of_different_tokenizers(place, tmp_path):
    model = shutil.copytree(place.reverse, tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = place.refused("tokenizers", f"reverse={model}")
    assert "their tokenizers or chat templates differ" in line and "config.reverse=" in line


def test_a_model_that_gives_nan(place, tmp_path):
    model = shutil.copytree(place.reverse, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    token = make_tokenizer(tmp_path / "tokenizer").convert_tokens_to_ids("Z")
    embeddings = tensors["model.embed_tokens.weight"]
    embeddings[:, 0], embeddings[token] = 0, np.eye(embeddings.shape[1], dtype=np.float32)[0]
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[0] = 0  # so that the first number stays this token's own
        elif name.endswith(("layers.0.mlp.gate_proj.weight", "layers.0.mlp.up_proj.weight")):
            tensor[:, 0] = 1e30
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    rows = [candidate(i, **({"instruction": "Z cats"} if i == 5 else {})) for i in range(9)]
    path = common.write_rows(tmp_path / "rows.jsonl", rows)
    settings = (f"reverse={model}", f"input={path}", "batch.row_length=200")  # one a row: NaN spreads to neighbours
    line = place.refused("nan", *settings)
    assert "rows.jsonl row 5 (instruction): the log-prob of token " in line and "by the reverse model is nan" in line


def test_scores_of_something_else_are_refused(place, filtered):
    scores = f"scores={place.path}/kept.jsonl.scores"
    for settings, says in (
        (["max_length=150"], "config.max_length=200, now 150"),
        (["prompts.synthetic_system=Web."], "config.prompts.synthetic_system="),
        ([f"forward={place.reverse}"], "fingerprint of its weights="),
    ):
        line = place.refused("other", scores, *settings)
        assert "response.jsonl: made with " in line and says in line


def test_responses_are_prepared_by_the_command(tmp_path):
    text = " ".join(["Rain is the water that falls to the ground from the clouds when they are cold."] * 4)
    documents = common.write_rows(tmp_path / "documents.jsonl", [{"body": text}, {"body": "Rain."}])
    flags = arguments("main_prepare", f"input={documents}", f"output={tmp_path}/responses.jsonl")
    done = fork("main_prepare", *flags, "--config.column=body").ok()
    assert "kept 1 of 1 segments, from 1 of 2 documents" in done.stdout
    assert common.read_rows(tmp_path / "responses.jsonl") == [{"id": "0/0", "response": text, "document": 0}]
    assert "column 'text' is missing" in fork("main_prepare", *flags).error()
