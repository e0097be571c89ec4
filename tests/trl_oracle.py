"""TRL's trainers as oracles for losses and gradients."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from lab.bench.material import trl_rows


@contextlib.contextmanager
def dpo_trainer(
    model_dir: str,
    ref_dir: str,
    pairs: Sequence[Mapping[str, Any]],
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Iterator[DPOTrainer]:
    """TRL's trainer in fp32, without dropout or truncation; arguments as in `dpo_oracle`."""
    with tempfile.TemporaryDirectory() as scratch:
        policy, reference = (
            transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            for path in (model_dir, ref_dir)
        )
        yield DPOTrainer(
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
            train_dataset=Dataset.from_list(trl_rows(pairs, "pairs")),
            processing_class=transformers.AutoTokenizer.from_pretrained(model_dir),
        )


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
    with dpo_trainer(model_dir, ref_dir, pairs, loss_type, beta, label_smoothing) as trainer:
        policy = trainer.model
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
