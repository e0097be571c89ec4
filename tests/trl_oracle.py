"""TRL's trainers as oracles for losses and gradients, and its DPOTrainer as a peer to be measured beside.

Run as `python -m tests.trl_oracle --model DIR --data musc_tdpo_demo.json --output metrics.json`.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

THREADS = 2


def conversational(row: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """A row with `instruction` and `input`, or one that is conversational already, as TRL's conversational row."""
    if "prompt" in row:
        return {name: row[name] for name in ("prompt", "chosen", "rejected")}
    question = "\n".join(filter(None, (row["instruction"], row.get("input"))))
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }


def dpo_oracle(
    model_dir: str,
    ref_dir: str,
    pairs: Sequence[Mapping[str, Any]],
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> dict[str, Any]:
    """TRL's loss on one batch of all pairs, fp32, without dropout or truncation.

    Args:
      model_dir: the policy.
      ref_dir: the reference.
      pairs: P conversational rows.
      loss_type: as DPOConfig names them (`sigmoid`, `hinge`, `ipo`, `robust`, `sft`, ...).
      beta: as in DPOConfig.
      label_smoothing: as in DPOConfig; read by `robust`.

    Returns:
      `loss`, a float (mean over pairs; of `sft`, over tokens); `rewards_chosen`, `rewards_rejected`, `logps_chosen` and
      `logps_rejected`, float64 [P]; `grads`, the loss's gradient for every parameter, {name: float32 array}.
    """
    with tempfile.TemporaryDirectory() as scratch:
        policy, reference = (
            transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            for path in (model_dir, ref_dir)
        )
        trainer = DPOTrainer(
            model=policy,
            ref_model=reference,
            args=DPOConfig(
                output_dir=scratch,
                loss_type=[loss_type],
                beta=beta,
                label_smoothing=label_smoothing,
                max_length=None,
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=True,
                report_to="none",
            ),
            train_dataset=Dataset.from_list([conversational(row) for row in pairs]),
            processing_class=transformers.AutoTokenizer.from_pretrained(model_dir),
        )
        rows = list(trainer.train_dataset)
        policy.eval()
        metrics = trainer._metrics["eval"]
        with torch.no_grad():
            for row in rows:  # TRL keeps means alone, so each pair makes a batch of its own
                trainer.compute_loss(policy, trainer.data_collator([row]))
        per_pair = {
            name.replace("/", "_"): np.asarray(metrics[name])
            for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
        }
        loss = trainer.compute_loss(policy, trainer.data_collator(rows))
        loss.backward()
    grads = {
        name: parameter.grad.numpy() for name, parameter in policy.named_parameters() if parameter.grad is not None
    }
    return {"loss": loss.item(), **per_pair, "grads": grads}


def sft_oracle(model_dir: str, rows: Sequence[Mapping[str, Any]], **settings: Any) -> dict[str, Any]:
    """TRL's supervised loss on one batch of all rows, fp32, without dropout or truncation.

    Args:
      rows: with `prompt` and `completion`, or `messages`.
      settings: of SFTConfig, as `assistant_only_loss`.

    Returns:
      `loss`, a float (mean over learnt tokens); `mean_token_accuracy`; `labels`, the ids that are learnt of each row;
      `grads`, the loss's gradient for every parameter, {name: float32 array}.
    """
    with tempfile.TemporaryDirectory() as scratch:
        model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=scratch,
                max_length=None,
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=True,
                report_to="none",
                **settings,
            ),
            train_dataset=Dataset.from_list([dict(row) for row in rows]),
            processing_class=transformers.AutoTokenizer.from_pretrained(model_dir),
        )
        model.eval()
        batch = trainer.data_collator(list(trainer.train_dataset))
        labels = [[i for i in row if i >= 0] for row in batch["labels"].tolist()]
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        (accuracy,) = trainer._metrics["eval"]["mean_token_accuracy"]
    grads = {name: parameter.grad.numpy() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": loss.item(), "mean_token_accuracy": accuracy, "labels": labels, "grads": grads}


class StepTimes(transformers.TrainerCallback):
    """Wall time of each step, data loading included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, *args, **kwargs) -> None:
        self._last = time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def train(args: argparse.Namespace, scratch: str) -> dict[str, Any]:
    """One epoch with the settings of the run on real input. Returns times in seconds, tokens and the log."""
    began = time.perf_counter()
    text = Path(args.data).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line] if args.data.endswith(".jsonl") else json.loads(text)
    times = StepTimes()
    trainer = DPOTrainer(
        model=args.model,
        args=DPOConfig(
            output_dir=scratch,
            model_init_kwargs={"dtype": "float32"},  # bf16 is TRL's default too: autocast over fp32 weights
            bf16=args.dtype == "bfloat16",
            beta=0.1,
            max_length=args.max_length,
            precompute_ref_log_probs=args.precompute_ref_log_probs,
            per_device_train_batch_size=args.batch_size,
            num_train_epochs=1,
            max_steps=args.steps,
            learning_rate=5e-6,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,  # a fraction below 1 is a share of the steps
            gradient_checkpointing=False,  # TRL's default trades time for memory that is not short here
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=Dataset.from_list([conversational(row) for row in rows]),
        processing_class=transformers.AutoTokenizer.from_pretrained(args.model),
        callbacks=[times],
    )
    ready = time.perf_counter()
    trainer.train()
    ended = time.perf_counter()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "settings": vars(args),
        "threads": torch.get_num_threads(),
        "steps": len(times.seconds),
        "setup_seconds": ready - began,  # loading, tokenising and, with the flag, the reference's log-probs
        "train_seconds": ended - ready,
        "total_seconds": ended - began,
        "steady_seconds": sum(times.seconds[1:]),
        "step_seconds": times.seconds,
        "num_tokens": log[-1]["num_tokens"],  # both sequences of every pair, without padding
        "log_history": trainer.state.log_history,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--data", required=True, help="preference rows, .json or .jsonl")
    parser.add_argument("--output", required=True, help="where the metrics go, .json")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=-1, help="stop early; -1: the whole epoch")
    parser.add_argument("--batch_size", type=int, default=4, help="pairs a step")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens of prompt and completion together")
    parser.add_argument("--precompute_ref_log_probs", action="store_true", help="run the reference once, beforehand")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as scratch:
        metrics = train(args, scratch)
    Path(args.output).write_text(json.dumps(metrics, indent=1))
    shown = ("steps", "setup_seconds", "train_seconds", "total_seconds", "steady_seconds", "num_tokens")
    print(json.dumps({name: metrics[name] for name in shown}))


if __name__ == "__main__":
    main()
