"""`launch.export_hf`: a run's checkpoint -> a Hugging Face directory that transformers loads."""

import dataclasses

from lm_jax import hf_io
from lm_jax.config import MeshConfig
from lm_jax.errors import UserError
from lm_jax.peft_io import export_peft
from lm_jax.sharding import make_mesh
from lm_jax.training.runs import open_model


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """`configs/export_hf.py` says what each key is for."""

    model: str
    output: str
    step: int | None
    dtype: str
    adapter: bool
    max_shard_bytes: int
    mesh: MeshConfig

    def __post_init__(self):
        if self.dtype not in hf_io.DTYPES:
            raise UserError(f"config.dtype: cannot export {self.dtype!r}; choose from {', '.join(hf_io.DTYPES)}")
        if self.max_shard_bytes < 1:
            raise UserError(f"config.max_shard_bytes: must be at least 1, got {self.max_shard_bytes}")


def export(config: ExportConfig) -> None:
    """Writes the newest (or the given) checkpoint of a run, with the starting model's tokenizer and templates.

    Adapters are merged into the model, or written alone in PEFT's format.

    Raises:
      UserError: no such run or step, an output that exists, no adapters where they were asked for.
    """
    hf_io.check_output(config.output)
    mesh = make_mesh(config.mesh)
    source = open_model(config.model, config.step)
    step = "" if source.step is None else f" step {source.step}"
    if config.adapter:
        if source.base is None:
            raise UserError(f"{config.model}: no run that trained adapters; leave config.adapter out")
        base = source.base.run or source.base.directory
        export_peft(source.load_adapters(mesh), source.config, source.lora, config.output, source.directory, base)
        print(f"exported the adapters of {config.model}{step} to {config.output} for {base}")
        return
    params = source.load_params(mesh, "float32")
    hf_io.export_hf(params, source.config, config.output, source.directory, config.dtype, config.max_shard_bytes)
    print(f"exported {config.model}{step} to {config.output} in {config.dtype}")
