"""Log-probs and entropies of GPT-4's responses to IFEval prompts are transformers', on real weights."""

import numpy as np
import pytest
import torch

from tests.real.common import launch, read, write

ROWS = 64
TOLERANCE = 1e-4  # nats


@pytest.fixture(scope="module")
def rows(shared_data) -> list[dict]:
    """64 across the file, of up to 512 words: prompts as messages, with the response that GPT-4 gave."""
    found = [row for row in read(shared_data / "ifeval_responses_gpt4.jsonl") if len(row["response"].split()) < 512]
    messages = [[{"role": "user", "content": row["prompt"]}] for row in found]
    return [{"prompt": prompt, "response": row["response"]} for prompt, row in zip(messages, found, strict=True)][
        :: len(found) // ROWS
    ][:ROWS]


def scored(model, rows, directory, dtype) -> list[dict]:
    given, output = write(directory / "rows.jsonl", rows), directory / f"{dtype}.jsonl"
    launch("score", f"model={model.directory}", f"input={given}", f"output={output}", f"dtype={dtype}", "batch.rows=2")
    return read(output)


def oracle(model, rows, dtype) -> list[np.ndarray]:
    """(log-probs, entropies) [2, R] of each response's tokens, from logits in `dtype` and float64 after that."""
    found, network = [], model.torch(dtype)
    for row in rows:
        ids = row["prompt_token_ids"] + row["token_ids"]
        with torch.inference_mode():
            logits = network(torch.tensor([ids]), logits_to_keep=len(row["token_ids"]) + 1).logits[0, :-1]
        logprobs = torch.log_softmax(logits.double(), -1)
        own = logprobs.gather(-1, torch.tensor(row["token_ids"])[:, None])[:, 0]
        found.append(torch.stack([own, -(logprobs.exp() * logprobs).sum(-1)]).numpy())
    return found


def ours(rows) -> list[np.ndarray]:
    return [np.array([row["token_logprobs"], row["token_entropies"]]) for row in rows]


@pytest.fixture(scope="module")
def exact(model, rows, tmp_path_factory):
    """(rows as launch.score leaves them in fp32, transformers' numbers for them)."""
    found = scored(model, rows, tmp_path_factory.mktemp("scores"), "float32")
    return found, oracle(model, found, "float32")


def test_tokens_are_the_chat_templates(model, rows, exact):
    for given, row in zip(rows, exact[0], strict=True):
        assert row["prompt_token_ids"] == model.chat(given["prompt"][0]["content"])
        end = model.tokenizer.eos_token_id
        assert row["token_ids"] == [*model.tokenizer.encode(given["response"], add_special_tokens=False), end]


def test_equal_to_transformers(exact):
    worst = [np.abs(a - b).max(1) for a, b in zip(ours(exact[0]), exact[1], strict=True)]
    print(f"log-probs {max(w[0] for w in worst):.2e}, entropies {max(w[1] for w in worst):.2e}")
    assert np.max(worst) <= TOLERANCE


def test_bfloat16_is_as_near_as_transformers(model, rows, exact, tmp_path):
    """Both round differently, so what is compared is how far each is from fp32 on the same tokens."""
    found = ours(scored(model, rows, tmp_path, "bfloat16"))
    theirs = oracle(model, exact[0], "bfloat16")
    truth = np.concatenate(exact[1], axis=1)
    (own, other) = (np.abs(np.concatenate(x, axis=1) - truth) for x in (found, theirs))
    print(f"bf16 from fp32, mean and 99.9%: ours {_spread(own)}, transformers {_spread(other)}")
    assert np.all(_spread(own) <= 1.1 * _spread(other))


def _spread(errors: np.ndarray) -> np.ndarray:
    return np.array([errors.mean(1), np.quantile(errors, 0.999, axis=1)])
