"""What TRL and transformers take for a row: the only file of the packages that imports torch.

Run by `lab.bench.bench` as a process of its own: `python -m lab.bench.peers ROW JSON` prints one line of JSON.
"""

import json
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
import transformers

from lab.bench import material

_FLOATS_OF_A_PAGE = 1024


class _StepTimes(transformers.TrainerCallback):
    """Wall time of each step, data loading included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, *args, **kwargs) -> None:
        self._last = time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def train(given: dict[str, Any]) -> dict[str, Any]:
    """One epoch of TRL's DPOTrainer, the reference computed in the step, as by default."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    times = _StepTimes()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = DPOTrainer(
            model=given["model"],
            args=DPOConfig(
                output_dir=scratch,
                model_init_kwargs={"dtype": "float32"},  # bf16 is TRL's default too: autocast over fp32 weights
                bf16=given["dtype"] == "bfloat16",
                beta=0.1,
                max_length=given["max_length"],
                per_device_train_batch_size=given["batch_pairs"],
                num_train_epochs=1,
                learning_rate=5e-6,
                lr_scheduler_type="cosine",
                warmup_steps=0.1,  # a fraction below 1 is a share of the steps
                gradient_checkpointing=False,  # TRL's default trades time for memory that is not short here
                use_cpu=not torch.cuda.is_available(),
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                seed=0,
            ),
            train_dataset=Dataset.from_list(material.read_pairs(given["pairs"])),
            processing_class=transformers.AutoTokenizer.from_pretrained(given["model"]),
            callbacks=[times],
        )
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    steps = times.seconds
    # The first step is counted at the mean of the others
    steady = sum(steps[1:]) * len(steps) / (len(steps) - 1)
    return {"seconds": steady, "tokens": log[-1]["num_tokens"], "first_loss": log[0]["loss"], "steps": len(steps)}


class _Ends(transformers.StoppingCriteria):
    """Each row is done at a length of its own, and the batch when all are: until then done rows get tokens too."""

    def __init__(self, ends: torch.Tensor) -> None:
        self._ends = ends  # [rows], prompt and padding included

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return input_ids.shape[1] >= self._ends


def generate(given: dict[str, Any], ends: bool = False) -> dict[str, Any]:
    """Greedy text, `material.budgets` tokens of every prompt; the best of three batch sizes."""
    tokenizer, network = _network(given, padding_side="left")
    network.generation_config.eos_token_id = None  # no other end than that of the budget
    texts = material.prompts(given["pairs"], tokenizer, given["prompts"])
    budgets = material.budgets(len(texts), given["new_tokens"], ends)
    order = list(range(len(texts)))
    if given["sorted"]:
        order.sort(key=lambda i: len(tokenizer(texts[i])["input_ids"]))
    made: dict[int, list[int]] = {}
    seconds = []
    for batch in (32, 64, 128):
        begin = time.perf_counter()
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            inputs = tokenizer([texts[i] for i in part], return_tensors="pt", padding=True).to(network.device)
            width, own = inputs["input_ids"].shape[1], [budgets[i] for i in part]
            done = [_Ends(width + torch.tensor(own, device=network.device))] if ends else []
            with torch.no_grad():
                out = network.generate(
                    **inputs,
                    do_sample=False,
                    max_new_tokens=given["new_tokens"],
                    pad_token_id=0,
                    stopping_criteria=transformers.StoppingCriteriaList(done),
                )
            made |= {i: row[: budgets[i]] for i, row in zip(part, out[:, width:].tolist(), strict=True)}
        seconds.append(time.perf_counter() - begin)
    return {
        "seconds": min(seconds),
        "tokens": sum(budgets),
        "texts": [tokenizer.decode(made[i], skip_special_tokens=True) for i in range(len(texts))],
    }


def generate_ends(given: dict[str, Any]) -> dict[str, Any]:
    """The same where answers end by themselves, at different lengths."""
    return generate(given, ends=True)


def score(given: dict[str, Any]) -> dict[str, Any]:
    """Log-probs of every response; the best of three batch sizes."""
    tokenizer, network = _network(given)
    rows = material.responses(given["pairs"], tokenizer, tokenizer.eos_token_id, given["max_length"])
    if given["sorted"]:
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    seconds, sums = [], []
    for batch in (8, 16, 32):
        begin, total = time.perf_counter(), 0.0
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            width = max(len(p) + len(r) for p, r in part)
            ids, wanted = np.zeros((len(part), width), np.int64), np.zeros((len(part), width), bool)
            for b, (p, r) in enumerate(part):
                ids[b, : len(p) + len(r)] = p + r
                wanted[b, len(p) : len(p) + len(r)] = True
            tokens = torch.from_numpy(ids).to(network.device)
            with torch.no_grad():
                logprobs = torch.log_softmax(network(tokens).logits[:, :-1].float(), -1)
                chosen = logprobs.gather(-1, tokens[:, 1:, None])[..., 0].cpu()
            total += float(chosen[torch.from_numpy(wanted)[:, 1:]].double().sum())
        seconds.append(time.perf_counter() - begin)
        sums.append(total)
    return {"seconds": min(seconds), "tokens": sum(len(p) + len(r) for p, r in rows), "sum": sums[0]}


def load(given: dict[str, Any]) -> dict[str, Any]:
    """`from_pretrained` into fp32, copied where asked, and a look at every page; the faster of two."""
    weights: list[torch.Tensor] = []
    before, seconds = material.forget_peak(), []
    for _ in range(2):
        weights.clear()
        begin = time.perf_counter()
        network = transformers.AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32)
        for parameter in network.parameters():
            if given["copied"]:
                parameter.data = parameter.data.clone()
            weights.append(parameter.detach())
        del network
        for weight in weights:
            weight.flatten()[::_FLOATS_OF_A_PAGE].sum()
        seconds.append(time.perf_counter() - begin)
    return {
        "seconds": min(seconds),
        "bytes": material.peak_memory() - before,
        "parameters": sum(weight.numel() for weight in weights),
        "sum": sum(float(weight.double().sum()) for weight in weights),
    }


def _network(given: dict[str, Any], **options):
    tokenizer = transformers.AutoTokenizer.from_pretrained(given["model"], **options)
    network = transformers.AutoModelForCausalLM.from_pretrained(given["model"], dtype=getattr(torch, given["dtype"]))
    return tokenizer, network.eval().to("cuda" if torch.cuda.is_available() else "cpu")


_ROWS = {f.__name__: f for f in (train, generate, generate_ends, score, load)}

if __name__ == "__main__":
    row, given = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps(_ROWS[row](given)))
