"""Every layout of docs/data.md: each example row there is read as the table says; oracle: TRL's own reading."""

import json
import re
from types import SimpleNamespace

import pytest
from datasets import Dataset
from trl import DPOTrainer, SFTConfig, SFTTrainer, maybe_extract_prompt
from trl.data_utils import maybe_convert_to_chatml

from lm_jax.data.faults import Faults
from lm_jax.data.layouts import PREFERENCE, PROMPTS, SUPERVISED, present_columns, read_layout, read_prompts
from lm_jax.data.preference import TIED, preference_rows
from lm_jax.data.supervised import supervised_rows
from lm_jax.data.text import TextEncoder
from musc_jax.pairs.tasks import read_tasks
from tests.documents import page_text
from tests.unit.test_text import CHATML, byte_level

ASKED, CHOSEN, REJECTED = "Name a sea.", "The Baltic Sea.", "Blue."
SYSTEM = "Be brief."


def examples(kind):
    """(row, cells behind it) of a table."""
    table = re.search(rf"<!-- layouts: {kind} -->\n(.*?)<!-- end -->", page_text("docs/data.md"), re.S)[1]
    lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()[2:]]
    return [(json.loads(cells[0].strip("`").replace("\\|", "|")), cells[1:]) for cells in lines]


def names(kind):
    return [f"{number}-{'-'.join(row)}"[:60] for number, (row, _) in enumerate(examples(kind))]


def chat(*turns, system):
    messages = [{"role": role, "content": text} for role, text in turns]
    return [{"role": "system", "content": SYSTEM}, *messages] if system else messages


def joined(prompt):
    """Without the line breaks between the texts of two columns."""
    return [{**m, "content": " ".join(m["content"].split())} for m in prompt] if isinstance(prompt, list) else prompt


def expected(row, form, response):
    if form == "raw text":
        return ASKED, response
    return chat(("user", ASKED), system=SYSTEM in json.dumps(row)), chat(("assistant", response), system=False)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level(CHATML, eos="<|im_end|>")


@pytest.mark.parametrize(("row", "cells"), examples("preference"), ids=names("preference"))
def test_preference_rows(tokenizer, row, cells):
    form, trl = cells[:2]
    (pair,) = preference_rows([row], "rows").rows
    assert (joined(pair.prompt), pair.chosen) == expected(row, form, CHOSEN)
    assert pair.rejected == expected(row, form, REJECTED)[1]
    if trl:
        assert trl == "same"
        trainer = SimpleNamespace(_tokenizer=tokenizer)
        data = Dataset.from_list([maybe_extract_prompt(row)])
        arguments = SimpleNamespace(dataset_num_proc=None, max_length=None)
        (theirs,) = DPOTrainer._prepare_dataset(trainer, data, tokenizer, arguments, "train")
        for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            ours = TextEncoder(tokenizer, 500).encode(pair.prompt, text, "row")
            assert ours.prompt_ids.tolist() == theirs["prompt_ids"]
            assert same_ids(tokenizer, ours.response_ids.tolist(), theirs[f"{side}_ids"])


def same_ids(tokenizer, ours, theirs):
    """Up to the line break that ChatML sets after the end token, which TRL learns too."""
    return ours == theirs[: len(ours)] and not tokenizer.decode(theirs[len(ours) :]).strip()


@pytest.mark.parametrize(("row", "cells"), examples("supervised"), ids=names("supervised"))
def test_supervised_rows(tokenizer, row, cells):
    form, trl = cells[:2]
    (read,) = supervised_rows([row], "rows").rows
    assert (joined(read.prompt), read.response) == expected(row, form, CHOSEN)
    if trl:
        assert trl == "same"
        theirs = trl_rows(tokenizer, maybe_convert_to_chatml(json.loads(json.dumps(row))))
        ((ours,),) = TextEncoder(tokenizer, 500).encode_conversations([read.prompt], [read.response], ["row"])
        assert same_ids(tokenizer, [*ours.prompt_ids.tolist(), *ours.response_ids.tolist()], theirs["input_ids"])
        if "completion" in row:
            labels = [-100] * len(ours.prompt_ids) + ours.response_ids.tolist()
            assert labels == theirs["labels"][: len(labels)]


def trl_rows(tokenizer, row):
    """The ids that SFTTrainer makes of a row."""
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=True)
    options = SFTConfig(output_dir="x", max_length=None, use_cpu=True, bf16=False, report_to="none")
    prepared = SFTTrainer._prepare_dataset(trainer, Dataset.from_list([row]), tokenizer, options, False, None, "train")
    return prepared[0]


@pytest.mark.parametrize(("row", "cells"), examples("prompts"), ids=names("prompts"))
def test_prompts(tmp_path, row, cells):
    faults = Faults("rows")
    found = read_prompts([row], faults)
    assert not faults.rows and joined(found[0]) == expected(row, cells[0], "")[0]
    if SYSTEM not in json.dumps(row) and not {"messages", "conversations"} & row.keys():
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        (task,), _ = read_tasks(str(tmp_path / "rows.jsonl"))
        assert " ".join(task.text.split()) == ASKED


@pytest.mark.parametrize(
    ("kind", "layouts"), [("preference", PREFERENCE), ("supervised", SUPERVISED), ("prompts", PROMPTS)]
)
def test_the_table_has_every_layout(kind, layouts):
    shown = {read_layout([row], layouts, Faults("rows"))[0] for row, _ in examples(kind)}
    assert shown == set(layouts)


def test_public_data_sets_that_are_named():
    for kind in ("preference", "supervised"):
        named = [name for _, cells in examples(kind) for name in re.findall(r"[\w.-]+/[\w.-]+", cells[2])]
        assert len(named) == len(set(named)) >= 19, kind


def test_ties_are_left_out_and_counted():
    rows = [row for row, _ in examples("preference") if {"preference_strength", "winner"} & row.keys()]
    for row, tie in zip(rows, ({"preference_strength": 0}, {"winner": "tie (bothbad)"}), strict=True):
        assert preference_rows([row, row | tie], "rows").dropped == {TIED: 1}


def test_what_stands_beside_does_not_choose_the_layout():
    """As data sets have them: scores, models, copies of the prompt, nulls for what a row has not."""
    row = {"chosen": None, "prompt_id": "x", "score_chosen": 8.5, "messages": None, "source": "evol", "models": ["a"]}
    for example, _ in examples("preference"):
        both = {k: v for k, v in row.items() if k not in example} | example
        assert preference_rows([both], "rows").rows[0].prompt == preference_rows([example], "rows").rows[0].prompt
    # As ultrafeedback_binarized and no_robots have it
    said = chat(("user", ASKED), ("assistant", CHOSEN), system=False)
    (read,) = supervised_rows([{"prompt": ASKED, "prompt_id": "x", "messages": said, "category": "qa"}], "rows").rows
    assert (read.prompt, read.response) == (said[:1], said[1:])


def test_names_in_capitals():
    assert present_columns({"Prompt": 1, "prompt": 2, "Chosen": 3}) == {"prompt": 2, "Prompt": 1, "chosen": 3}
