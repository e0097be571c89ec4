"""What is measured where no data are given: made-up instructions, responses that obey or break them, a tokenizer."""

import dataclasses
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lm_jax.data.rows import write_jsonl

PAIRS = 256
VOCAB_SIZE = 512  # the 256 bytes, so that any text can be typed in, and merges for the demo's own words

_TOPICS = {
    "fruits": ("apple", "banana", "cherry", "grape", "lemon", "mango", "orange", "peach"),
    "animals": ("bear", "cat", "deer", "fox", "horse", "mouse", "otter", "wolf"),
    "colours": ("amber", "blue", "green", "grey", "pink", "red", "violet", "white"),
    "tools": ("axe", "chisel", "drill", "file", "hammer", "pliers", "saw", "wrench"),
    "cities": ("athens", "berlin", "cairo", "lima", "madrid", "oslo", "paris", "tokyo"),
}
_COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5}
# Each axis: the words of a constraint -> what a response that obeys it has there
_AXES: dict[str, dict[str, Any]] = {
    "separator": {
        "separated by commas": ", ",
        "separated by semicolons": "; ",
        "separated by dashes": " - ",
        "each on its own line": "\n",
    },
    "case": {
        "names in capital letters": str.upper,
        "names in small letters": str.lower,
        "names with capital initials": str.title,
    },
    "start": {"beginning with Answer": "Answer: ", "beginning with Here": "Here: ", "beginning with List": "List: "},
    "end": {"ending with done": " done", "ending with over": " over", "ending with a full stop": "."},
}
_UNASKED: dict[str, Any] = {"separator": " ", "case": str.lower, "start": "", "end": ""}
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Demo:
    """Where `make_demo` wrote what."""

    tokenizer: Path  # directory, in Hugging Face format; a model can be saved beside it
    pairs: Path
    vocab_size: int


def make_demo(directory: str | Path, seed: int) -> Demo:
    """Writes preference rows and a tokenizer trained on them; a function of `seed` alone.

    Rows are TRL's conversational ones with MuSC's columns. The chosen response obeys every constraint; the rejected one
    obeys `perturbed_constraints` instead, which drop or substitute one or two of them. No prompt occurs twice.

    Args:
      directory: made if need be; its `tokenizer/` and `pairs.jsonl` are written over.
      seed: of the rows.
    """
    directory = Path(directory)
    rows = list(itertools.islice(_rows(random.Random(seed)), PAIRS))
    tokenizer, pairs = directory / "tokenizer", directory / "pairs.jsonl"
    write_jsonl(str(pairs), rows)
    return Demo(tokenizer, pairs, vocab_size=_write_tokenizer(tokenizer, rows))


def _rows(rng: random.Random) -> Iterator[dict[str, Any]]:
    seen = set()
    while True:
        row = _pair(rng)
        prompt = row["prompt"][0]["content"]
        if prompt not in seen:
            seen.add(prompt)
            yield {"id": f"demo-{len(seen)}", **row}


def _pair(rng: random.Random) -> dict[str, Any]:
    topic, count = rng.choice(list(_TOPICS)), rng.choice(list(_COUNTS))
    items = rng.sample(_TOPICS[topic], _COUNTS[count])
    task = f"List {count} {topic}"
    asked = {axis: rng.choice(list(_AXES[axis])) for axis in rng.sample(list(_AXES), rng.randint(3, 4))}
    perturbed = dict(asked)
    for axis in rng.sample(list(asked), rng.randint(1, 2)):
        # A dropped constraint must leave another response behind, which small letters by themselves would not
        droppable = _AXES[axis][asked[axis]] != _UNASKED[axis]
        if droppable and rng.random() < 0.5:
            del perturbed[axis]
        else:
            perturbed[axis] = rng.choice([option for option in _AXES[axis] if option != asked[axis]])
    return {
        "prompt": _message("user", _instruction(task, asked)),
        "chosen": _message("assistant", _response(items, asked)),
        "rejected": _message("assistant", _response(items, perturbed)),
        "constraints": [task, *asked.values()],
        "perturbed_constraints": [task, *perturbed.values()],
        "perturbed_prompt": _message("user", _instruction(task, perturbed)),
    }


def _instruction(task: str, constraints: dict[str, str]) -> str:
    return ", ".join([task, *constraints.values()]) + "."


def _response(items: list[str], constraints: dict[str, str]) -> str:
    form = {axis: _AXES[axis][constraints[axis]] if axis in constraints else _UNASKED[axis] for axis in _AXES}
    return form["start"] + form["separator"].join(form["case"](item) for item in items) + form["end"]


def _message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _write_tokenizer(directory: Path, rows: list[dict[str, Any]]) -> int:
    """Returns the size of the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = ("system\n", "user\n", "assistant\n")
    texts = [row[name][0]["content"] for row in rows for name in ("prompt", "chosen", "rejected")]
    tokenizer.train_from_iterator([*roles, *texts], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=_CHATML
    ).save_pretrained(directory)
    return tokenizer.get_vocab_size()
