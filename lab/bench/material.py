"""What both sides of a row are given: a Hugging Face model, preference rows, prompts and responses of their text."""

import json
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lab.bench.demo import make_demo
from lab.commands import make_random_model
from lm_jax.config import ModelConfig, RopeConfig
from lm_jax.data.preference import preference_rows
from lm_jax.data.rows import read_rows, write_jsonl
from lm_jax.errors import UserError

PROMPT_LENGTHS = (20, 200)  # tokens
SLOT_LENGTH = 512  # tokens of a prompt and its answer


def prepare(directory: Path, model: str | None, pairs: str | None, num_pairs: int | None, layers: int) -> str:
    """Writes `directory`/pairs.jsonl, and a random model where none is given. Returns the model's directory.

    Pairs whose sides are identical, which training drops, are left out for both sides.

    Raises:
      UserError: pairs without a model, whose tokenizer they would need.
    """
    if pairs is not None and model is None:
        raise UserError("config.model: not set; config.input needs a model whose tokenizer knows its text")
    directory.mkdir(parents=True, exist_ok=True)
    if pairs is None:
        demo = make_demo(directory / "demo", 0)
        pairs = str(demo.pairs)
        if model is None:
            model = str(directory / "model")
            make_random_model(Path(model), demo.tokenizer, _small(demo.vocab_size, layers), 0)
    write_jsonl(str(directory / "pairs.jsonl"), trl_rows(read_rows(pairs), pairs)[:num_pairs])
    return str(model)


def _small(vocab_size: int, layers: int) -> ModelConfig:
    return ModelConfig("llama", vocab_size, layers, 256, 576, 8, 4, 32, RopeConfig(1e4), 1e-6, 2048)


def trl_rows(rows: Sequence[Mapping[str, Any]], where: str) -> list[dict[str, Any]]:
    """Preference rows of any layout in TRL's, without identical pairs; see `preference_rows`."""
    found = preference_rows(rows, where).rows
    return [{"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in found]


def read_pairs(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def prompts(path: str, tokenizer: Any, number: int) -> list[str]:
    """Pieces of the chosen responses' text, of 20 to 200 tokens."""
    text = " ".join(_text(row["chosen"]) for row in read_pairs(path))
    ids, rng = tokenizer(text)["input_ids"], np.random.default_rng(0)
    shortest, longest = PROMPT_LENGTHS
    if len(ids) <= longest:
        raise UserError(f"config.input: its chosen responses have {len(ids)} tokens in all; give more than {longest}")
    lengths = rng.integers(shortest, longest + 1, number)
    starts = rng.integers(0, len(ids) - longest, number)
    return [tokenizer.decode(ids[s : s + n]) for s, n in zip(starts, lengths, strict=True)]


def budgets(number: int, new_tokens: int, ends: bool) -> list[int]:
    """Tokens of each answer: `new_tokens`, or, where answers end by themselves, about a quarter of it on average."""
    if not ends:
        return [new_tokens] * number
    rng = np.random.default_rng(1)
    return np.minimum(rng.geometric(min(4 / new_tokens, 1.0), number), new_tokens).tolist()


def responses(path: str, tokenizer: Any, end_id: int, max_length: int) -> list[tuple[list[int], list[int]]]:
    """Token ids of every (prompt, response), both sides of every pair; the response ends with the end token."""
    found = []
    for row in read_pairs(path):
        for side in ("chosen", "rejected"):
            prompt, response = (tokenizer(_text(row[name]))["input_ids"] for name in ("prompt", side))
            prompt = prompt[: max_length // 2]
            found.append((prompt, [*response[: max_length - len(prompt) - 1], end_id]))
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(message["content"] for message in value)


def forget_peak() -> int:
    """Bytes of memory that this process has now; `peak_memory` is the most from here on."""
    if (refs := Path("/proc/self/clear_refs")).exists():  # Linux
        refs.write_text("5")
    return peak_memory()


def peak_memory() -> int:
    """The most bytes of memory that this process had."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of macOS, in bytes
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
