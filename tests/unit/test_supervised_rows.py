"""Supervised rows: every layout gives the same conversation, what is learnt of it, and every fault with its cure."""

import json

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lm_jax.data.packing import fill_rows
from lm_jax.data.supervised import NO_WEIGHT, load_supervised, supervised_rows
from lm_jax.data.text import TextEncoder
from lm_jax.errors import UserError

# With the markers that transformers makes its own mask of; they cover a turn's words and its end token
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# In the manner of Qwen3: what was thought is shown in the last turn alone
FORGETS = MARKED.replace("{% generation %}", "{% generation %}{{ '<think>' if loop.last else '' }}")
TURNS = ["what is the sea?", "it is wide", "and blue?", "blue, and that is that", "is it?", "yes, it is"]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def conversation(n=6, system=False):
    turns = [(assistant if i % 2 else user)(text) for i, text in enumerate(TURNS[:n])]
    return [{"role": "system", "content": "be brief"}] * system + turns


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        [*TURNS, "user assistant system\n\n"] * 3,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<|im_end|>", "<|im_start|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=MARKED)


def one(row, **options):
    (read,) = supervised_rows([row], "rows.jsonl", **options).rows
    return read


def raised(rows, **options):
    with pytest.raises(UserError) as caught:
        supervised_rows(rows if isinstance(rows, list) else [rows], "rows.jsonl", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("Hi"), assistant("a")]},
        {"messages": [user("Hi"), assistant("a"), user("thanks")], "prompt": None},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "a"}], "system": ""},
        {"conversations": [{"role": "human", "content": "Hi"}, {"role": "gpt", "content": "a"}]},
        {"messages": [{**user("Hi"), "tool_calls": None}, assistant("a") | {"name": None}], "tools": ""},
        {"prompt": [user("Hi")], "response": "a"},
        {"prompt": [user("Hi")], "response": [assistant("a")]},
        {"prompt": [user("Hi")], "completion": [assistant("a")]},
        {"instruction": "Hi", "output": "a"},
        {"instruction": "", "input": "Hi", "output": "a", "system": None, "history": []},
    ],
)
@pytest.mark.parametrize("train_on", ["all", "last"])
def test_layouts_of_the_same_messages(row, train_on):
    read = one(row | {"id": 5}, train_on=train_on)
    assert (read.prompt, read.response) == ([user("Hi")], [assistant("a")])
    assert (read.id, read.weight, read.source) == ("5", 1.0, "seed")


def test_strings_stay_strings():
    read = one({"prompt": "Hi", "response": "a", "weight": 2, "source": "synthetic", "output": "x"})
    assert (read.row, read.id, read.prompt, read.response) == (0, "0", "Hi", "a")
    assert (read.weight, read.source) == (2.0, "synthetic")


SYSTEM = {"role": "system", "content": "be brief"}
SHAREGPT = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(TURNS)]
HISTORY = {"history": [TURNS[:2], TURNS[2:4]], "system": "be brief", "instruction": TURNS[4], "output": TURNS[5]}


@pytest.mark.parametrize(
    "row",
    [{"messages": conversation(system=True)}, {"conversations": SHAREGPT, "system": "be brief"}, HISTORY],
)
def test_turns_of_a_conversation(row):
    whole = conversation(system=True)
    every, last = one(row), one(row, train_on="last")
    assert (every.prompt, every.response) == (whole[:2], whole[2:])
    assert (last.prompt, last.response) == (whole[:6], whole[6:])


# In the manner of Qwen and Llama 3: the functions first, calls as JSON, what they return in a turn of its own
WITH_TOOLS = "{% if tools %}{{ '<|im_start|>tools ' + tools | tojson + '<|im_end|>' }}{% endif %}" + MARKED.replace(
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}",
    "{{ m['content'] + (m.tool_calls | tojson if m.tool_calls else '') + '<|im_end|>' }}{% endgeneration %}",
)
SCHEMA = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}
CALL = {"name": "tide", "arguments": {"at": "noon"}}
CALLED = [
    user("when is it?"),
    {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "content": "7", "name": "tide"},
    assistant("it is 7"),
]
TOOL_ROWS = [
    {"messages": CALLED, "tools": [SCHEMA]},
    {"messages": CALLED, "tools": json.dumps([SCHEMA])},
    {"prompt": CALLED[:1], "completion": CALLED[1:], "tools": [SCHEMA]},
    {
        "conversations": [
            {"from": "human", "value": "when is it?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "7"},
            {"from": "gpt", "value": "it is 7"},
        ],
        "tools": json.dumps([SCHEMA]),
    },
]


@pytest.mark.parametrize("row", TOOL_ROWS, ids=["TRL", "JSON", "prompt", "LLaMA-Factory"])
def test_tools_go_through_the_chat_template(tokenizer, tmp_path, row, monkeypatch):
    """Ids and mask are transformers' own, of a template that shows functions and calls."""
    monkeypatch.setattr(tokenizer, "chat_template", WITH_TOOLS)
    expected = tokenizer.apply_chat_template(
        [{"content": "", **turn} for turn in CALLED],
        tools=[SCHEMA],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    (segment,) = encode(tokenizer, row, tmp_path).segments
    ids = [*segment.prompt, *segment.response]
    assert ids == expected["input_ids"][: len(ids)] and "tide" in tokenizer.decode(segment.prompt)
    mask = [*[0] * len(segment.prompt), *segment.loss_mask.astype(int)]
    assert mask == expected["assistant_masks"][: len(ids)] and sum(mask) == sum(expected["assistant_masks"])


def test_a_dataset_with_tools_is_read_as_the_file(tokenizer, tmp_path, monkeypatch):
    """Arrow gives every message every field, with nulls."""
    monkeypatch.setattr(tokenizer, "chat_template", WITH_TOOLS)
    datasets.Dataset.from_list([TOOL_ROWS[1]]).save_to_disk(tmp_path / "saved")
    (a,) = load_supervised(str(tmp_path / "saved"), TextEncoder(tokenizer, 400)).segments
    (b,) = encode(tokenizer, TOOL_ROWS[1], tmp_path).segments
    assert a.prompt.tolist() == b.prompt.tolist() and a.response.tolist() == b.response.tolist()


def test_tools_that_the_template_would_leave_out(tokenizer, tmp_path):
    with pytest.raises(UserError, match="rows.jsonl row 0: has tools, which the chat template does not show; use a"):
        encode(tokenizer, TOOL_ROWS[0], tmp_path)


def test_a_prompt_is_never_learnt():
    turns = conversation()
    read = one({"prompt": turns[:3], "response": turns[3:]})
    assert (read.prompt, read.response) == (turns[:3], turns[3:])
    read = one({"prompt": turns[:2], "response": turns[2:]})  # its first message is the user's
    assert (read.prompt, read.response) == (turns[:3], turns[3:])


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "Hi"),
        ({"prompt": [user("Hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]}, [user("Hi")]),
        ({"chosen": [user("Hi"), assistant("a")], "rejected": [user("Hi"), assistant("b")]}, [user("Hi")]),
        ({"instruction": "Hi", "chosen": "a", "rejected": "b"}, [user("Hi")]),
        ({"messages": [user("no")], "prompt": "Hi", "chosen": "a"}, "Hi"),
    ],
)
def test_preference_rows_with_a_response_column(row, prompt):
    read = one(row, response_column="chosen")
    assert (read.prompt, read.response) == (prompt, "a" if prompt == "Hi" else [assistant("a")])


GOOD = {"prompt": "p", "response": "a"}


@pytest.mark.parametrize(
    ("row", "says", "cure"),
    [
        ({"text": "a"}, "text is a text without turns", '--config.columns="prompt=..."'),
        ({"ask": "a"}, "it has ask, no layout that is known", '--config.columns="messages=..."'),
        ({"prompt": "p", "chosen": "a"}, "column 'response' is missing", '--config.columns="response=..."'),
        ({"instruction": "p"}, "column 'output' is missing", "it has instruction"),
        ({"prompt": "p", "response": 3}, "response must be a string or messages, got int", "give a list"),
        ({"prompt": 3, "response": "a"}, "prompt must be a string or messages, got int", "give a list"),
        ({"messages": "a"}, "messages is a text without turns", "give messages"),
        ({"messages": []}, "messages is an empty list", "give a list"),
        ({"messages": [{"role": "user"}]}, "messages message 0 has no content", "give a list"),
        (
            {"messages": [{"role": "template_arguments", "content": "hello"}]},
            "the role template_arguments, kept for",
            "rename the role",
        ),
        (
            {"messages": [user("a"), assistant("b")], "chat_template_kwargs": "no"},
            "chat_template_kwargs: must be a JSON object",
            'as {"enable_thinking": false}',
        ),
        (
            {"messages": [user("a"), assistant("b")], "chat_template_kwargs": {"tokenize": True}},
            "chat_template_kwargs: tokenize is set by the command itself",
            "leave it out",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "message 0 has a part of type 'image_url'",
            "drop the row",
        ),
        (
            {"messages": [user("a") | {"train": True}, assistant("b")]},
            "message 0 is to be learnt, but is of the user",
            "only the assistant's",
        ),
        ({"messages": [user("a"), assistant("b") | {"weight": "x"}]}, "message 1 has the weight 'x'", "mend"),
        (
            {"messages": [user("a"), assistant("b") | {"weight": 0.5}, user("c"), assistant("d")]},
            "has turns of the weights 0.5, 1",
            "give the other turns 0",
        ),
        ({"messages": [user("a"), assistant("b")], "image": "x.png"}, "has image, and models here read text", "image="),
        ({"messages": [user("a")]}, "no assistant message", "drop the row"),
        ({"messages": [assistant("a"), user("b")]}, "begins with an assistant message", "drop the row"),
        ({"conversations": [{"role": "user"}]}, "message 0 has no content", "give a list"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "is from 'narrator'; known are user", "drop it"),
        ({"conversations": []}, "conversations is an empty list", "drop the row"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "is a function_call that is no JSON of", "mend"),
        ({"messages": [user("a"), assistant("b")], "tools": "{"}, "tools must be a list of JSON schemas", "mend"),
        ({"messages": [user("a"), assistant("b")], "tools": [1]}, "tools must be a list of JSON schemas", "mend"),
        ({"instruction": "", "output": "a"}, "both empty", "drop the row"),
        ({"instruction": "p", "output": ["a"]}, "output is a list of str, neither", "mend"),
        (
            {"instruction": "p", "output": "a", "history": [["q"]]},
            "history message 0 is no object but list",
            "give a l",
        ),
        (GOOD | {"weight": -1}, "weight is -1, no finite number >= 0", "mend the row"),
        (GOOD | {"weight": float("nan")}, "weight is nan", "mend the row"),
        (GOOD | {"weight": float("inf")}, "weight is inf", "mend the row"),
        (GOOD | {"weight": True}, "weight is True", "mend the row"),
        (GOOD | {"weight": "one"}, "weight is 'one'", "mend the row"),
    ],
)
def test_faulty_rows_are_named(row, says, cure):
    error = raised(row)
    assert error.startswith("rows.jsonl row 0: ") and says in error and cure in error, error


def test_a_mixture_of_layouts_is_named():
    error = raised([GOOD, {"instruction": "i", "output": "a"}])
    assert error.startswith(
        "rows.jsonl row 1: the columns are instruction, input, output, but in most rows prompt, response; one file must"
    )
    assert "row 1: the prompt is messages, but in most rows" in raised([GOOD, {"prompt": [user("p")], "response": "a"}])


def test_a_data_sets_own_source_is_not_ours():
    """B05: read as ours only where all values are, or where the user says so."""
    rows = [GOOD | {"source": s} for s in ("flan", "synthetic", None)]
    data = supervised_rows(rows, "f")
    assert [r.source for r in data.rows] == ["seed"] * 3 and "source, 'flan', 'synthetic', is not ours" in data.read_as
    assert [r.source for r in supervised_rows(rows[1:], "f").rows] == ["synthetic", "seed"]
    with pytest.raises(UserError, match="f row 0: source is 'flan'; it must be seed or synthetic"):
        supervised_rows(rows, "f", named=("source",))


def test_turns_of_weight_0_are_read_not_learnt(tokenizer, tmp_path):
    """B08: as OpenAI's `weight` and axolotl's `train`; what is left is learnt as in a conversation without."""
    turns = conversation()
    plain = learnt_ids(encode(tokenizer, {"messages": turns}, tmp_path).segments[0])
    spans = np.flatnonzero(np.diff([False, *plain[1], False])).reshape(-1, 2)  # of the assistant's turns
    for key, off, on in (("weight", 0, 1), ("train", False, True), ("training", False, None)):
        for learnt in ((1,), (0, 2), (2,), (0,), (1, 2)):
            marked = [t | {key: on if i // 2 in learnt else off} if i % 2 else t for i, t in enumerate(turns)]
            ids, mask = learnt_ids(encode(tokenizer, {"messages": marked}, tmp_path).segments[0])
            assert ids == plain[0][: spans[learnt[-1]][1]]
            assert np.flatnonzero(mask).tolist() == [i for k in learnt for i in range(*spans[k])]
    marked = [t | {"weight": 0} for t in turns]
    assert supervised_rows([{"messages": marked}], "f").dropped == {NO_WEIGHT: 1}
    # ShareGPT's, with weights on all turns (SlimOrca)
    slim = [t | {"weight": i % 2} for i, t in enumerate(SHAREGPT)]
    assert one({"conversations": slim}) == one({"conversations": SHAREGPT})
    half = [user("a"), assistant("b") | {"weight": 0}, user("c"), assistant("d") | {"weight": 0.5}]
    read = one({"messages": half, "weight": 0.5})
    assert (read.weight, read.response, read.prompt[1]) == (0.25, [assistant("d")], assistant("b"))


def test_a_conversation_that_the_model_begins(tokenizer, tmp_path):
    """What it says before anyone else is read, not learnt; the ids are the template's."""
    turns = [assistant("hello"), *conversation(4)]
    read = one({"messages": turns})
    assert (read.prompt, read.response) == (turns[:2], turns[2:])
    ids, mask = learnt_ids(encode(tokenizer, {"messages": turns}, tmp_path).segments[0])
    theirs = tokenizer.apply_chat_template(turns, return_assistant_tokens_mask=True, return_dict=True, tokenize=True)
    assert theirs["input_ids"][: len(ids)] == ids
    first = theirs["assistant_masks"].index(0, theirs["assistant_masks"].index(1))  # behind hello
    assert mask == [0] * first + theirs["assistant_masks"][first : len(ids)]


def test_weightless_rows_are_dropped_and_counted():
    data = supervised_rows([GOOD | {"weight": w} for w in (1, 0, 0.5, 1e-60)], "f")
    assert [(r.row, r.weight) for r in data.rows] == [(0, 1.0), (2, 0.5)] and data.dropped == {NO_WEIGHT: 2}


# --- masks -----------------------------------------------------------------------------------------------------------


def encode(tokenizer, row, tmp_path, max_length=400, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (row if isinstance(row, list) else [row])))
    return load_supervised(str(path), TextEncoder(tokenizer, max_length), **options)


def learnt_ids(segment):
    """(all ids, which of them are learnt)"""
    mask = np.ones(len(segment.response), bool) if segment.loss_mask is None else segment.loss_mask
    return [*segment.prompt.tolist(), *segment.response.tolist()], [*[False] * len(segment.prompt), *mask.tolist()]


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("turns", [2, 4, 5, 6])
def test_the_mask_is_that_of_the_templates_own_markers(tokenizer, tmp_path, turns, system):
    messages = conversation(turns, system)
    theirs = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True, tokenize=True)
    (segment,) = encode(tokenizer, {"messages": messages}, tmp_path).segments
    ids, mask = learnt_ids(segment)
    # Ours ends with the last end token; what follows it is not learnt there either
    assert theirs["input_ids"][: len(ids)] == ids and theirs["assistant_masks"][: len(ids)] == mask
    assert not any(theirs["assistant_masks"][len(ids) :]) and sum(mask) > 3
    assert (segment.loss_mask is None) == (turns == 2)


def test_train_on_the_last_turn(tokenizer, tmp_path):
    (segment,) = encode(tokenizer, {"messages": conversation()}, tmp_path, train_on="last").segments
    assert segment.loss_mask is None
    assert tokenizer.decode(segment.response) == "yes, it is<|im_end|>"
    assert tokenizer.decode(segment.prompt).endswith("is it?<|im_end|>\n<|im_start|>assistant\n")


def test_every_turn_starts_where_generation_would(tokenizer, tmp_path):
    """Also where the template's line break and the turn's own would be one token, which tokenising at once makes."""
    words = ["a", "\n\nit", "b", "\n\nis", "a", "is"]
    messages = [(assistant if i % 2 else user)(text) for i, text in enumerate(words)]
    encoder = TextEncoder(tokenizer, 400)
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    (segment,) = encode(tokenizer, {"messages": messages}, tmp_path).segments
    ids, mask = learnt_ids(segment)
    begins = [i for i in range(1, len(ids)) if mask[i] and not mask[i - 1]]
    assert ids[: begins[0]] == encoder.encode_prompt(messages[:1], "row").tolist()
    assert [ids[begin - 1] for begin in begins] == tokenizer("\n")["input_ids"] * 3
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    parts = np.split(np.array(ids), np.flatnonzero(np.diff(mask)) + 1)
    assert [tokenizer.decode(p) for p in parts[1::2]] == [f"{text}<|im_end|>" for text in words[1::2]]


def test_truncation_ends_with_a_learnt_token(tokenizer, tmp_path):
    whole = learnt_ids(encode(tokenizer, {"messages": conversation()}, tmp_path).segments[0])
    first = whole[1].index(True)
    for max_length in range(first + 1, len(whole[0])):
        data = encode(tokenizer, {"messages": conversation()}, tmp_path, max_length=max_length)
        ids, mask = learnt_ids(data.segments[0])
        assert ids == whole[0][: len(ids)] and mask == whole[1][: len(ids)] and mask[-1]
        assert len(ids) <= max_length and not any(whole[1][len(ids) : max_length])
        assert "1 examples truncated" in data.report[1]


def test_a_batch_holds_masks_weights_and_sources(tokenizer, tmp_path):
    rows = [
        {"messages": conversation(), "weight": 0.5, "source": "synthetic"},
        {"messages": conversation(2), "weight": 0},
        {"messages": conversation(2)},
    ]
    data = encode(tokenizer, rows, tmp_path)
    assert (
        data.report[0]
        == "rows.jsonl: 3 rows read, 2 kept, dropped: 1 of weight 0; 1 of them synthetic; read as messages"
    )
    assert [data.name(0), data.name(1)] == ["rows.jsonl row 0", "rows.jsonl row 2"]
    assert data.sources() == {"seed", "synthetic"}
    batch = fill_rows([[0, 1]], [(s,) for s in data.segments], 200, 2, ("weights", "synthetic"))
    start = 0
    for segment, weight, synthetic in zip(data.segments, (0.5, 1), (1, 0), strict=True):
        ids, mask = learnt_ids(segment)
        at = slice(start, start + len(ids) - 1)
        np.testing.assert_array_equal(batch["loss_mask"][0, at], mask[1:])
        np.testing.assert_array_equal(batch["targets"][0, at], ids[1:])
        learnt = batch["loss_mask"][0, at] > 0
        assert set(batch["weights"][0, at][learnt]) == {weight} and set(batch["synthetic"][0, at][learnt]) == {
            synthetic
        }
        start += len(ids)
    assert batch["loss_mask"].sum() == sum(sum(learnt_ids(s)[1]) for s in data.segments)


@pytest.mark.parametrize(
    ("template", "row", "options", "parts"),
    [
        (MARKED, {"messages": [user("a"), assistant(" "), *conversation(2)]}, {}, ["row 0", "is empty", "drop"]),
        (MARKED, {"prompt": "a", "response": ""}, {}, ["row 0", "response is empty", "drop the row"]),
        (MARKED, {"messages": conversation()}, {"max_length": 8}, ["row 0", "lost to truncation", "raise max_length"]),
        (MARKED, {"prompt": "a", "response": "b", "weight": 0}, {}, ["no rows left", "1 of weight 0"]),
        (None, {"messages": conversation()}, {}, ["row 0", "no chat template", "give strings"]),
        (MARKED.replace("'<|im_end|>' }}{% endgen", "'' }}{% endgen"), {"messages": conversation()}, {},
         ["row 0", "end token not trained"]),
    ],
)  # fmt: skip
def test_faults_of_the_text_are_named(tokenizer, tmp_path, template, row, options, parts, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(UserError) as caught:
        encode(tokenizer, row, tmp_path, **options)
    assert [] == [part for part in parts if part not in str(caught.value)], caught.value


def test_the_last_turn_can_be_learnt_where_the_template_forgets(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", FORGETS)
    (segment,) = encode(tokenizer, {"messages": conversation()}, tmp_path, train_on="last").segments
    assert tokenizer.decode(segment.response) == "<think>yes, it is<|im_end|>"


def test_real_rows(shared_data):
    rows = json.loads((shared_data / "alpaca_en_demo.json").read_text())
    data = supervised_rows(rows, "alpaca")
    assert len(data.rows) == 1000 and not data.dropped
    for read, row in zip(data.rows, rows, strict=True):
        assert read.prompt == [user("\n".join(filter(None, (row["instruction"], row["input"]))))]
        assert read.response == [assistant(row["output"])]
