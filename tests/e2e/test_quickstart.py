"""What `make quickstart` left in this checkout: both methods help, and what is exported is what was measured.

The margins are well below what was measured (BUILD_NOTES.md, the lab): another machine rounds otherwise.
"""

import json

import pytest
import torch
import transformers

from lm_jax.data.rows import read_rows, write_jsonl
from tests.conftest import ROOT
from tests.e2e.common import arguments, run

QUICKSTART = ROOT / "runs" / "quickstart"
REPORT = QUICKSTART / "report.json"

pytestmark = [
    pytest.mark.slow,  # .ci/run names this file, after make quickstart
    pytest.mark.skipif(not REPORT.exists(), reason="make quickstart was not run in this checkout"),
]


@pytest.fixture(scope="module")
def report():
    return json.loads(REPORT.read_text())


def test_musc_improves_the_seed_model(report):
    gain = report["musc"]["gain"]
    assert gain["mean"] >= 0.05 and gain["mean"] > gain["half_width"]
    assert report["musc"]["arms"]["after MuSC"]["well_formed"] > 0.85


def test_the_filter_keeps_what_is_true(report):
    truth = report["main"]["truth"]
    assert truth["kept"] - truth["all"] >= 0.10


def test_transformers_answers_as_the_exported_model_does_here(tmp_path):
    model, asked, out = QUICKSTART / "musc" / "trained", tmp_path / "asked.jsonl", tmp_path / "out.jsonl"
    rows = read_rows(str(QUICKSTART / "data" / "held_out.jsonl"))[:32]
    write_jsonl(str(asked), rows)
    given = (f"model={model}", f"input={asked}", f"output={out}", "temperature=0.0", "max_new_tokens=64")
    run("generate", *arguments("generate", *given)).ok()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    equal = 0
    for row in read_rows(str(out)):
        ids = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        new = theirs.generate(**ids, max_new_tokens=64, do_sample=False)[0, ids["input_ids"].shape[1] :]
        equal += tokenizer.decode(new, skip_special_tokens=True) == row["response"]
    assert equal >= len(rows) - 1  # a tie in the logits may go either way
