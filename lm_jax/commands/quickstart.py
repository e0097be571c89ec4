"""`launch.quickstart`: the main job on an embedded default, through the commands that a real run uses."""

import shutil
import time
from pathlib import Path

from lm_jax.commands.steps import make_random_model, run_step
from lm_jax.config import ModelConfig, RopeConfig
from lm_jax.lab.demo import make_demo
from lm_jax.training.metrics import training_records

_MAX_LENGTH = 96  # the demo's longest prompt and response take 68 tokens


def quickstart(directory: str, seed: int = 0) -> None:
    """Makes a small Llama and preference pairs, trains it on them, exports it and shows what changed.

    Every step prints the command it runs, so that a user can put their own model or data in its place.

    Args:
      directory: emptied first; everything is written below it.

    Raises:
      UserError: a command failed; its own error stands above.
    """
    root = Path(directory)
    began = time.monotonic()
    shutil.rmtree(root, ignore_errors=True)
    print(f"1. a small Llama and preference pairs, both made here, in {root}", flush=True)
    demo = make_demo(root / "data", seed)
    _make_model(root / "model", demo.tokenizer, demo.vocab_size, seed)

    print("\n2. train it to prefer the responses that keep every constraint", flush=True)
    run_step(
        "launch.musc_train",
        "--config=configs/musc_train.py:tiny",
        f"--config.model={root}/model",
        f"--config.input={demo.pairs}",
        f"--config.eval_input={demo.eval_pairs}",
        f"--config.output={root}/run",
        f"--config.max_length={_MAX_LENGTH}",
        "--config.batch.rows=4",
        f"--config.batch.row_length={5 * _MAX_LENGTH}",
        "--config.epochs=6",
        "--config.eval_every=20",
        "--config.optim.learning_rate=1e-3",
        "--config.checkpoints.every=40",
    )

    print("\n3. take a Hugging Face checkpoint home", flush=True)
    run_step(
        "launch.export_hf",
        "--config=configs/export_hf.py",
        f"--config.model={root}/run",
        f"--config.output={root}/trained",
        "--config.dtype=float32",
    )

    evaluations = [r for r in training_records(f"{root}/run") if "eval_loss" in r]
    print("\nheld-out pairs (64 prompts that training never saw): chosen response preferred")
    print("  step   loss   accuracy   margin")
    print("     0  0.6931      -       0.0000   (the policy is its own reference)")
    for r in evaluations:
        accuracy, margin = r["eval_rewards/accuracies"], r["eval_rewards/margins"]
        print(f"  {r['step']:4d}  {r['eval_loss']:.4f}   {accuracy:6.1%}   {margin:.4f}")
    print(f"\nall in {time.monotonic() - began:.0f} s. Where everything is:")
    for path, what in (
        ("data/pairs.jsonl", "preference pairs, one JSON object a line"),
        ("model", "the Llama before training"),
        ("run", "the run: metrics.jsonl, tensorboard/, plots/, checkpoints/"),
        ("trained", "the Llama after training; transformers loads it"),
    ):
        print(f"  {root / path}: {what}")


def _make_model(directory: Path, tokenizer: Path, vocab_size: int, seed: int) -> None:
    config = ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        num_layers=4,
        d_model=128,
        d_ff=352,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rope=RopeConfig(theta=10000.0),
        norm_eps=1e-5,
        max_position=1024,
    )
    make_random_model(directory, tokenizer, config, seed)
