"""What a result of the user's own task depends on: its file, and the rows, code and templates that it names."""

import pytest

from lm_jax.evaluation.tasks import task_fingerprint

TASK = """task: mine
include: base.yaml
dataset_path: json
dataset_kwargs:
  data_files: {"test": "rows.jsonl"}
doc_to_target: !function helpers.target
doc_to_text: "{{question}} e.g. a/b or Vice-versa. etc."
"""


@pytest.fixture
def place(tmp_path):
    files = {"mine.yaml": TASK, "base.yaml": "a: template.txt"}
    files |= dict.fromkeys(("rows.jsonl", "helpers.py", "template.txt", "other.jsonl"), "x")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize("found", ["by file", "by name"])
@pytest.mark.parametrize("name", ["mine.yaml", "rows.jsonl", "helpers.py", "base.yaml", "template.txt", "other.jsonl"])
def test_what_it_names_counts(place, name, found):
    given = (str(place / "mine.yaml"), None) if found == "by file" else ("mine", str(place))
    before = task_fingerprint(*given)
    assert before == task_fingerprint(*given) is not None
    with (place / name).open("a") as file:
        file.write(" \n")
    assert (task_fingerprint(*given) != before) == (name != "other.jsonl")


def test_a_task_of_lm_evals_has_none(place):
    assert task_fingerprint("arc_easy", str(place)) is None and task_fingerprint("arc_easy", None) is None
