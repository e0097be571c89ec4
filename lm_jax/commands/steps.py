"""What commands share that run other commands: a step that shows its command line, and a model to begin with."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from lm_jax import hf_io
from lm_jax.config import ComputeConfig, ModelConfig
from lm_jax.errors import UserError
from lm_jax.models.decoder import Decoder


def run_step(module: str, *arguments: str) -> None:
    """Prints the command line and runs it.

    Raises:
      UserError: it failed; its own error stands above.
    """
    print(f"$ python -m {module} \\\n    " + " \\\n    ".join(arguments), flush=True)
    if subprocess.run([sys.executable, "-m", module, *arguments]).returncode:
        raise UserError(f"python -m {module} failed; its error stands above")


def make_random_model(directory: Path, tokenizer: Path, config: ModelConfig, seed: int) -> None:
    """Writes a randomly initialised model in Hugging Face format, with the tokenizer of `tokenizer` beside it."""
    tokens = jnp.ones((1, 8), jnp.int32)
    decoder = Decoder(config, ComputeConfig(dtype="float32"))
    params = decoder.init(jax.random.key(seed), tokens, tokens, tokens)["params"]
    hf_io.export_hf(params, config, directory, source_dir=tokenizer, dtype="float32")
