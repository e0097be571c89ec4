"""The page in README.md: a few pairs of our own, weighed by a small model that was fitted to them.

    python -m tests.report_page OUTPUT_DIR

writes OUTPUT_DIR/page.html (and what it is made from) and, where Chromium is installed, OUTPUT_DIR/report.png. The
model has read both responses under their own instructions, so what it knows is where the two part ways.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lm_jax.data.rows import write_jsonl
from tests.browser import screenshot
from tests.checkpoints import CHATML
from tests.e2e.common import arguments, run

STEPS = 60  # more, and it knows the texts by heart, so that no entropy is left
VIEW = "#sort=constraints&desc=1&theme=light&pair=lighthouse&token=rejected.29"

# Each constraint and what became of it: None kept, "" dropped, else its negation or substitute
PAIRS = [
    {
        "id": "lighthouse",
        "constraints": [
            ("Does the response tell a story about a lighthouse keeper?", None),
            ("Is the story told in the first person?", None),
            ("Does every paragraph begin with a time of day?", ""),
            ("Does it leave out the word sea?", "Does it use the word sea?"),
        ],
        "full": "Write a short story about a lighthouse keeper. Tell it in the first person, begin every "
        "paragraph with a time of day, and leave out the word sea.",
        "perturbed": "Write a short story about a lighthouse keeper. Tell it in the first person, and use the "
        "word sea.",
        "chosen": "Half past four. I climb the stairs with the oil can in one hand and my father's watch in the "
        "other. The lamp is already warm, as if somebody had waited here for me.\n\nMidnight. A ship answers, "
        "three short flashes and a long one. I have not heard that greeting in eleven years.\n\nDawn. I write the "
        "name of the ship into the log, and then my own beside it, in case anyone should ask who kept the light.",
        "rejected": "I climb the stairs with the oil can in one hand and my father's watch in the other. The lamp "
        "is already warm, and the sea is as flat as a table.\n\nThen a ship answers, three short flashes and a "
        "long one. I have not heard that greeting from the sea in eleven years.\n\nI write the name of the ship "
        "into the log, and close the book.",
    },
    {
        "id": "breakfasts",
        "constraints": [
            ("Does the response list three breakfasts?", None),
            ("Does each line begin with an arrow?", None),
            ("Are the names given in Greek, too?", ""),
        ],
        "full": "List three breakfasts. Begin each line with an arrow, and give the names in Greek, too.",
        "perturbed": "List three breakfasts. Begin each line with an arrow.",
        "chosen": "→ sesame bread (κουλούρι), best while it is warm\n→ cheese pie (τυρόπιτα), with black tea\n→ "
        "rice pudding (ρυζόγαλο), with cinnamon on top",
        "rejected": "→ sesame bread, best while it is warm\n→ a croissant, with butter\n→ rice pudding, with "
        "cinnamon on top",
    },
    {
        "id": "refund-mail",
        "constraints": [
            ("Does the response answer a customer who wants a refund?", None),
            ("Does it stay under sixty words?", None),
            ("Does it name a date for the payment?", ""),
            ("Does it end with a question?", None),
        ],
        "full": "Answer a customer who wants a refund for a broken kettle. Stay under sixty words, name a date "
        "for the payment, and end with a question.",
        "perturbed": "Answer a customer who wants a refund for a broken kettle. Stay under sixty words, and end "
        "with a question.",
        "chosen": "Dear Ms Okafor,\n\nI am sorry about the kettle. We will pay the full price back to your card "
        "by Friday, 14 March; there is no need to send anything to us. May we write again in a month, to ask how "
        "the next one serves you?",
        "rejected": "Dear Ms Okafor,\n\nI am sorry about the kettle. We will pay the full price back to your card "
        "soon; there is no need to send anything to us. Is there anything else that we can do for you?",
    },
    {
        "id": "sorting",
        "constraints": [
            ("Does the response explain insertion sort?", None),
            ("Does it use playing cards as the example?", "Does it use books on a shelf as the example?"),
            ("Does it say what it costs?", None),
        ],
        "full": "Explain insertion sort. Use playing cards as the example, and say what it costs.",
        "perturbed": "Explain insertion sort. Use books on a shelf as the example, and say what it costs.",
        "chosen": "Take the cards up one by one. Hold each new card against those in your hand, from the right, "
        "until you meet a smaller one, and push it in there. With n cards that takes about n²/4 looks on average, "
        "and n when they come in order.",
        "rejected": "Take the books down one by one. Hold each new book against those on the shelf, from the "
        "right, until you meet a thinner one, and push it in there. With n books that takes about n²/4 looks on "
        "average, and n when they come in order.",
    },
]


def rows() -> list[dict]:
    """Preference rows as `launch.musc_pairs` writes them."""
    return [
        {
            "id": pair["id"],
            "prompt": _message("user", pair["full"]),
            "chosen": _message("assistant", pair["chosen"]),
            "rejected": _message("assistant", pair["rejected"]),
            "constraints": [text for text, _ in pair["constraints"]],
            "perturbed_constraints": [text if new is None else new for text, new in pair["constraints"] if new != ""],
            "perturbations": [_edit(i, text, new) for i, (text, new) in enumerate(pair["constraints"])],
            "perturbed_prompt": _message("user", pair["perturbed"]),
        }
        for pair in PAIRS
    ]


def _message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def _edit(index: int, text: str, new: str | None) -> dict:
    kind = "kept" if new is None else "dropped" if new == "" else "negated" if "sea" in new else "substituted"
    return {"index": index, "kind": kind, "old": text, "new": text if new is None else new or None, "planned": kind}


def fit(directory: Path, texts: list[list[dict[str, str]]], steps: int = STEPS) -> None:
    """Saves a tokenizer of these conversations and a small Llama that was fitted to them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user", "assistant", *(m["content"] for text in texts for m in text)], trainer)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    wrapped.save_pretrained(directory)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(wrapped),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            bos_token_id=None,
            eos_token_id=wrapped.eos_token_id,
            pad_token_id=wrapped.pad_token_id,
            dtype="float32",
        )
    )
    batch = wrapped([wrapped.apply_chat_template(t, tokenize=False) for t in texts], padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == wrapped.pad_token_id, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=batch["input_ids"], labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(directory)


def make(directory: Path, steps: int = STEPS) -> Path:
    """Fits, weighs, and writes the page; its path."""
    directory.mkdir(parents=True, exist_ok=True)
    pairs, weighed, output = (directory / name for name in ("pairs.jsonl", "weighed.jsonl", "page.html"))
    shutil.rmtree(directory / "weighed.weights", ignore_errors=True)  # of another fit
    made = rows()
    write_jsonl(str(pairs), made)
    texts = [row[p] + row[r] for row in made for p, r in (("prompt", "chosen"), ("perturbed_prompt", "rejected"))]
    fit(directory / "model", texts, steps)
    model = f"model={directory / 'model'}"
    weigh = (model, f"input={pairs}", f"output={weighed}", "rules=calibrated_entropy,kl,pmi", "keep_scores=true")
    run("musc_token_weights", *arguments("musc_token_weights", *weigh, preset="tiny")).ok()
    run("report", *arguments("report", model, f"input={weighed}", f"output={output}", preset="tiny")).ok()
    return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    asked = parser.parse_args()
    made_page = make(asked.directory)
    print(
        json.dumps(
            {
                "page": str(made_page),
                "picture": screenshot(made_page, asked.directory / "report.png", VIEW, width=1280, height=1170),
            }
        )
    )
