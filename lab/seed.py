"""`launch.lab_seed`: a seed model for a world of the lab, fitted from nothing, and the gate that it must pass."""

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.commands import make_random_model, run_step
from lab.worlds.compositions import COMPLEX
from lab.worlds.data import instructions
from lab.worlds.gate import check_gate, make_gate
from lab.worlds.seed_data import CURRICULUM, decomposed, seed_rows
from lab.worlds.tokenizer import write_tokenizer
from lab.worlds.worlds import WORLDS
from lm_jax.config import ModelConfig, RopeConfig
from lm_jax.data.rows import read_rows, write_jsonl
from lm_jax.errors import UserError
from lm_jax.generation.rounds import begin_directory
from musc_jax.pairs.conversations import task_texts

_EXAMPLES = 10  # decomposed instructions that a method is given as in-context examples


@dataclasses.dataclass(frozen=True)
class LabSeedConfig:
    """`configs/lab_seed.py` says what each key is for."""

    world: str
    output: str
    seed: int
    rows: int
    learning_rate: float
    batch_examples: int
    max_length: int
    words: str
    gate: float
    gate_rows: int

    def __post_init__(self):
        if self.world not in WORLDS:
            raise UserError(f"config.world={self.world!r}: unknown world; choose {' or '.join(WORLDS)}")
        for name in ("rows", "batch_examples", "max_length", "gate_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"config.{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.gate <= 1:
            raise UserError(f"config.gate={self.gate}: must lie between 0 and 1")


def fit_seed(config: LabSeedConfig) -> None:
    """Fits a small Qwen3 on a world's seed rows, stage after stage, exports it and measures what it can do.

    Below `config.output`: `data/` (the rows, in-context examples and held-out prompts), `start/` (the model before), a
    run directory for each stage, `model/` (the seed model in Hugging Face format), `gate.json`. Stages that are done
    stay as they are.

    Raises:
      UserError: a step failed, the model is below the gate, or `config.output` holds something else.
    """
    root = Path(config.output)
    settings = dataclasses.asdict(config)
    begin_directory(config.output, "lab_seed", settings, ("output", "gate"))
    gate = root / "gate.json"
    if gate.exists():
        print(f"{root}/model: fitted before", flush=True)
    else:
        _fit_all(config, root)
    shares = json.loads(gate.read_text())
    print("greedy, on held-out instructions: " + ", ".join(f"{k} {v:.1%}" for k, v in shares.items()), flush=True)
    check_gate(shares, config.gate, f"{root}/model")


def copy_fitted(fitted: Path, wanted: Mapping[str, Any], output: Path) -> None:
    """Copies the directory of a finished `launch.lab_seed`; `output` appears when it is whole.

    Args:
      wanted: settings that it must have been fitted with.

    Raises:
      UserError: it is none, or of other settings; a fit that was interrupted lies in `output`.
    """
    if output.exists():
        raise UserError(f"{output}: a fit that was interrupted; remove it, or leave config.fitted out to go on with it")
    settings = fitted / "config.json"
    if not (settings.exists() and (fitted / "gate.json").exists()):
        raise UserError(f"config.fitted={fitted}: no seed model; launch.lab_seed and make quickstart leave one")
    given = json.loads(settings.read_text())["config"]
    if other := [f"{key}={given[key]}, not {value}" for key, value in wanted.items() if given[key] != value]:
        raise UserError(f"config.fitted={fitted}: fitted with {'; '.join(other)}: give another, or leave it out")
    copied = output.with_name("seed.tmp")
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(fitted, copied)
    copied.rename(output)


def _fit_all(config: LabSeedConfig, root: Path) -> None:
    world, data, began = WORLDS[config.world], root / "data", time.monotonic()
    rows = {
        stage.name: list(seed_rows(world, stage, config.seed, round(config.rows * stage.share)))
        for stage in CURRICULUM
    }
    for name, made in rows.items():
        write_jsonl(str(data / f"{name}.jsonl"), made)
    examples = [decomposed(world, i) for i in instructions(world, config.seed, "examples", _EXAMPLES, COMPLEX)]
    write_jsonl(str(data / "examples.jsonl"), examples)
    # Labels of the method's prompts stand in every such row; a few hundred rows have them all
    texts = [m["content"] for made in rows.values() for row in made[:500] for m in row["messages"]]
    size = write_tokenizer(data / "tokenizer", world, task_texts(), [*texts, config.words])
    if not (root / "start").exists():
        make_random_model(root / "start", data / "tokenizer", _model(size), config.seed)
    model = root / "start"
    for stage in CURRICULUM:
        _fit(config, model, data / f"{stage.name}.jsonl", root / stage.name, last=stage is CURRICULUM[-1])
        model = root / stage.name
    if not (root / "model").exists():
        run_step(
            "launch.export_hf",
            "--config=configs/export_hf.py",
            f"--config.model={model}",
            f"--config.output={root}/model",
            "--config.dtype=float32",
        )
    print(f"fitted in {time.monotonic() - began:.0f} s", flush=True)
    gate = make_gate(world, config.seed, config.gate_rows, examples)
    write_jsonl(str(root / "gate.json"), [gate.measure(_greedy(config, root, gate.rows()))])


def _fit(config: LabSeedConfig, model: Path, rows: Path, output: Path, last: bool) -> None:
    run_step(
        "launch.main_train",
        "--config=configs/main_train.py:tiny",
        f"--config.model={model}",
        f"--config.input={rows}",
        f"--config.output={output}",
        f"--config.seed={config.seed}",
        "--config.optim.warmup_ratio=0.1",  # every stage begins with a new optimiser state
        f"--config.max_length={config.max_length}",
        f"--config.batch.examples={config.batch_examples}",
        "--config.batch.row_lengths=1",
        f"--config.optim.learning_rate={config.learning_rate}",
        f"--config.optim.schedule={'cosine' if last else 'constant'}",
        "--config.optim.beta2=0.98",
        "--config.checkpoints.every=100000",
    )


def _greedy(config: LabSeedConfig, root: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Row id -> answer."""
    write_jsonl(str(root / "data/gate.jsonl"), rows)
    run_step(
        "launch.generate",
        "--config=configs/generate.py",
        f"--config.model={root}/model",
        f"--config.input={root}/data/gate.jsonl",
        f"--config.output={root}/gate_answers.jsonl",
        "--config.temperature=0.0",
        "--config.max_new_tokens=160",
        f"--config.decode.max_length={config.max_length + 160}",
        "--config.mesh.data=-1",
        "--config.mesh.tensor=1",
    )
    return {row["id"]: row["response"] for row in read_rows(str(root / "gate_answers.jsonl"))}


def _model(vocab_size: int) -> ModelConfig:
    """About 0.66M parameters; norms of queries and keys go with the high learning rate."""
    return ModelConfig(
        family="qwen3",
        qk_norm=True,
        vocab_size=vocab_size,
        num_layers=3,
        d_model=128,
        d_ff=352,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        rope=RopeConfig(theta=10000.0),
        norm_eps=1e-5,
        max_position=1024,
        tie_embeddings=True,
    )
