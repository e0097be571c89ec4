"""DPO's first step on 8 real pairs is TRL's, on real weights: loss, log-probs, gradient norm, parameters after it."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tests.real.common import launch, read, write
from tests.trl_oracle import dpo_trainer

PAIRS, BETA = 8, 0.1
# So large an epsilon makes Adam's first step about proportional to the gradient; with a small one it is its sign
RATE, EPS, CLIP = 1e-2, 1e-3, 1.0
RTOL = 1e-3  # of the largest change of a parameter
COMPARED = ("layers.0.self_attn.q_proj", "layers.11.mlp.down_proj", "layers.23.input_layernorm", "model.norm")


@pytest.fixture(scope="module")
def pairs(model, shared_data) -> list[dict]:
    """The authors' shortest ones, in the model's chat format as raw text."""
    rows = [r for r in json.loads((shared_data / "musc_tdpo_demo.json").read_text()) if r["chosen"] != r["rejected"]]
    rows.sort(key=lambda row: sum(len(row[name]) for name in ("instruction", "input", "chosen", "rejected")))
    return [
        {
            "prompt": model.tokenizer.decode(model.chat("\n\n".join(filter(None, (r["instruction"], r["input"]))))),
            "chosen": r["chosen"],
            "rejected": r["rejected"],
        }
        for r in rows[:PAIRS]
    ]


@pytest.fixture(scope="module")
def theirs(model, pairs):
    """TRL's, with torch's AdamW for a few of the parameters."""
    with dpo_trainer(str(model.directory), str(model.directory), pairs, beta=BETA) as trainer:
        policy = trainer.model.train()
        loss = 0.0
        for row in trainer.train_dataset:  # gradient accumulation: a batch of all would not fit many a memory
            part = trainer.compute_loss(policy, trainer.data_collator([row])) / PAIRS
            part.backward()
            loss += part.item()
        logps = {side: np.mean(trainer._metrics["train"][f"logps/{side}"]) for side in ("chosen", "rejected")}
    named = dict(policy.named_parameters())
    norm = torch.nn.utils.clip_grad_norm_(named.values(), CLIP).item()
    compared = {name: p for name, p in named.items() if any(part in name for part in COMPARED)}
    before = {name: p.detach().clone() for name, p in compared.items()}
    torch.optim.AdamW(compared.values(), lr=RATE, eps=EPS, weight_decay=0.0).step()
    changes = {name: (p.detach() - before[name]).numpy() for name, p in compared.items()}
    return {"loss": loss, "grad_norm": norm, "logps": logps, "before": before, "changes": changes}


@pytest.fixture(scope="module")
def ours(model, pairs, tmp_path_factory):
    """(metrics of the step, directory that holds the parameters after it), as the commands leave them."""
    directory = tmp_path_factory.mktemp("dpo")
    given, run, output = write(directory / "pairs.jsonl", pairs), directory / "run", directory / "exported"
    launch(
        "musc_train", f"model={model.directory}", f"input={given}", f"output={run}", "weights=uniform",
        "max_length=512", f"batch.pairs={PAIRS}", "epochs=1", f"loss.beta={BETA}", f"optim.learning_rate={RATE}",
        f"optim.eps={EPS}", f"optim.clip_norm={CLIP}", "optim.warmup_ratio=0.0", "optim.schedule=constant",
        "batch.rows_per_device=1", "compute.remat=full",  # 0.5B in fp32 would take 18 GB otherwise
        preset="tiny",
    )  # fmt: skip
    launch("export_hf", f"model={run}", f"output={output}", "dtype=float32")
    (step,) = (row for row in read(run / "metrics.jsonl") if "loss" in row)
    return step, output


def test_first_step_equals_trl(ours, theirs):
    step, output = ours
    assert step["pairs"] == PAIRS
    assert step["loss"] == pytest.approx(math.log(2), abs=1e-6) and theirs["loss"] == pytest.approx(step["loss"])
    assert step["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    for side, sum_of_tokens in theirs["logps"].items():
        assert step[f"logps/{side}"] == pytest.approx(sum_of_tokens, rel=1e-5)
    worst = {}
    for file in output.glob("*.safetensors"):
        with safe_open(file, "np") as content:
            for name in theirs["changes"].keys() & content.keys():
                change, expected = content.get_tensor(name) - theirs["before"][name].numpy(), theirs["changes"][name]
                worst[name] = np.abs(change - expected).max() / np.abs(expected).max()
    print({name: f"{error:.1e}" for name, error in worst.items()}, f"gradient norm {theirs['grad_norm']:.4f}")
    assert worst.keys() == theirs["changes"].keys() and max(worst.values()) < RTOL
