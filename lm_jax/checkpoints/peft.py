"""Adapters in PEFT's format: what `peft.PeftModel.from_pretrained` loads onto the model that they were trained on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from safetensors.numpy import save_file

from lm_jax.checkpoints.directories import appears_whole, check_output, copy_side_files, write_card
from lm_jax.config import LoraConfig, ModelConfig
from lm_jax.distributed.processes import barrier
from lm_jax.models.lora import peft_config, peft_tensors
from lm_jax.sharding import to_host
from lm_jax.strict_json import dumps


def export_peft(
    adapters: Mapping[str, Any],
    config: ModelConfig,
    lora: LoraConfig,
    output_dir: str | Path,
    source_dir: str | Path,
    base: str,
    card: str | None = None,
) -> None:
    """Writes adapter_config.json, adapter_model.safetensors (fp32) and the tokenizer. All processes call it.

    Args:
      adapters: sharded in any way.
      output_dir: local, gs:// or s3://, absent or empty. It appears whole or not at all.
      source_dir: the tokenizer, chat template and generation config are copied from here.
      base: how PEFT finds the model that the adapters belong to: a directory or a hub id.
      card: text of its README.md.

    Raises:
      UserError: the output exists and is not empty.
    """
    check_output(output_dir)
    host = to_host(adapters)
    if jax.process_index() == 0:
        with appears_whole(output_dir) as partial:
            tensors = peft_tensors(host, config, lora)
            save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
            settings = dumps(peft_config(config, lora, base), indent=2) + "\n"
            (partial / "adapter_config.json").write_text(settings, encoding="utf-8")
            copy_side_files(source_dir, partial)
            write_card(card, partial)
    barrier("the end of the export")
