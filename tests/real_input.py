"""The model of the run on real input: a tokenizer trained on the real data's text, and a small random Llama.

Run as `python -m tests.real_input OUTPUT_DIR`.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.checkpoints import CHATML

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CHINESE = {"cfbench.json"}  # its characters would take a large share of the vocabulary
VOCAB_SIZE = 8192


def texts(data: Path) -> Iterator[str]:
    """Every string with a space in it, which leaves out ids and labels. The order is always the same."""

    def strings(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            if " " in value:
                yield value
        elif isinstance(value, (list, dict)):
            for item in value.values() if isinstance(value, dict) else value:
                yield from strings(item)

    for file in sorted(data.rglob("*.json*")):
        if file.name not in CHINESE:
            with file.open(encoding="utf-8") as lines:
                for document in lines if file.suffix == ".jsonl" else [lines.read()]:
                    yield from strings(json.loads(document))


def make_tokenizer(directory: Path, data: Path = DATA) -> transformers.PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer with a ChatML template on the text of `data`, and saves it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(data), trainer)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    wrapped.save_pretrained(directory)
    return wrapped


SIZES = {  # 8.0M parameters
    "hidden_size": 256,
    "intermediate_size": 576,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def make_model(directory: Path, tokenizer: transformers.PreTrainedTokenizerFast, **sizes: int) -> int:
    """Saves a random fp32 Llama of SIZES, `sizes` in their place, for the tokenizer. Returns its parameter count."""
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        **{**SIZES, **sizes},
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(directory)
    return model.num_parameters()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.real_input OUTPUT_DIR")
    output = Path(sys.argv[1])
    print(f"{make_model(output, make_tokenizer(output)):,} parameters in {output}")
