"""A run's checkpoint as a Hugging Face directory.

    python -m launch.export_hf --config=configs/export_hf.py --config.model=runs/musc --config.output=runs/musc-hf

Expect: a directory that `AutoModelForCausalLM.from_pretrained` and serving engines load, with a model card, README.md:
base model, data, method, results, settings, versions and the command that trained it. `--config.push_to_hub=org/name`
uploads it when it is whole; the token is the environment's HF_TOKEN.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.model = placeholder(str)  # run directory
    c.output = placeholder(str)  # local, gs:// or s3://; must not exist, or be empty
    c.step = placeholder(int)  # which checkpoint; none: the newest
    c.dtype = "bfloat16"  # what serving engines expect
    c.adapter = False  # of a run that trained adapters: True writes them alone, for PEFT; else they are merged
    c.max_shard_bytes = 5_000_000_000  # transformers' usual shard size
    c.push_to_hub = placeholder(str)  # org/name, made if need be; none: nothing is uploaded
    c.private = True  # of a repository that is made; to publish is a decision of its own

    c.mesh = ConfigDict()
    c.mesh.data = 1
    c.mesh.fsdp = -1  # all devices
    c.mesh.tensor = 1
    return c
