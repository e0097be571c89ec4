"""`launch.export_hf`: a run's checkpoint -> a Hugging Face directory that transformers loads, with a model card."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from lm_jax.checkpoints import hf as hf_io
from lm_jax.checkpoints.buckets import is_remote
from lm_jax.checkpoints.directories import check_output
from lm_jax.checkpoints.hub import check_push, push
from lm_jax.checkpoints.model_card import model_card
from lm_jax.checkpoints.peft import export_peft
from lm_jax.checkpoints.runs import ModelSource, open_model
from lm_jax.checkpoints.settings import read_settings, training_records
from lm_jax.config import MeshConfig
from lm_jax.errors import UserError
from lm_jax.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """`configs/export_hf.py` says what each key is for."""

    addresses: ClassVar = ("output",)

    model: str
    output: str
    step: int | None = None
    dtype: str = "bfloat16"
    adapter: bool = False
    max_shard_bytes: int = 5000000000
    push_to_hub: str | None = None
    private: bool = True
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        if self.dtype not in hf_io.DTYPES:
            raise UserError(f"config.dtype: cannot export {self.dtype!r}; choose from {', '.join(hf_io.DTYPES)}")
        if self.max_shard_bytes < 1:
            raise UserError(f"config.max_shard_bytes: must be at least 1, got {self.max_shard_bytes}")
        if self.push_to_hub and is_remote(self.output):
            raise UserError("config.push_to_hub: uploads what lies on a local disk; give config.output a local path")


def export(config: ExportConfig) -> None:
    """Writes the newest (or the given) checkpoint of a run, with the starting model's tokenizer and templates.

    Adapters are merged into the model, or written alone in PEFT's format: those that were trained on others as one
    with them. Those of a base in nf4 are merged into the full one, as a line says: the model is not exactly the one
    that was trained. What is whole may go to the hub then.

    Raises:
      UserError: no such run or step, an output that exists, no adapters where they were asked for, an upload that
        failed.
    """
    check_output(config.output)
    if config.push_to_hub:
        check_push(config.push_to_hub)
    mesh = make_mesh(config.mesh)
    source = open_model(config.model, config.step)
    step = "" if source.step is None else f" step {source.step}"
    card = _card(config, source)
    if config.adapter:
        adapters, lora, base = source.stacked_adapters(mesh)
        export_peft(adapters, source.config, lora, config.output, source.directory, base, card)
        print(f"exported the adapters of {config.model}{step} to {config.output} for {base}")
    else:
        params, directory = source.load_params(mesh, "float32"), source.directory
        hf_io.export_hf(params, source.config, config.output, directory, config.dtype, config.max_shard_bytes, card)
        print(f"exported {config.model}{step} to {config.output} in {config.dtype}")
    if config.push_to_hub:
        push(config.output, config.push_to_hub, config.private)
        print(f"uploaded {config.output} to https://huggingface.co/{config.push_to_hub}")


def _card(config: ExportConfig, source: ModelSource) -> str | None:
    """None of a model that no run here trained."""
    if source.run is None:
        return None
    name = config.push_to_hub or Path(config.output).name
    return model_card(name, read_settings(source.run), source.step, training_records(source.run), config.adapter)
