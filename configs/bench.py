"""Ours and the peer in turn, on the same model, data and dtype: a ratio for each row, bench.json and PNG plots.

    python -m launch.bench --config=configs/bench.py --config.output=runs/bench

Expect: a line a row and peer with both times, the ratio, tokens/s and whether both computed the same. transformers is
given rows as they come and sorted by length; in `generate_ends` answers end at lengths of their own. The peers need
torch and TRL (`pip install -e '.[test]'`); `--config.rows="('growth',)"` needs neither. Without model and input the
rows run on the demo's pairs and a random model of 4M parameters. Preset: `:tiny`, small models and few rows, some
minutes.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(preset: str = "") -> ConfigDict:
    c = ConfigDict()
    c.model = placeholder(str)  # Hugging Face directory; none: a random model with the demo's tokenizer
    c.input = placeholder(str)  # preference rows; none: the demo's 256 pairs
    c.output = placeholder(str)  # directory
    c.rows = ("train", "generate", "generate_ends", "score", "load", "growth")  # what is measured, in this order
    c.dtype = "float32"  # of ours, and of the peer but in `train`, where TRL runs in both
    c.num_pairs = placeholder(int)  # the first ones alone; none: all
    c.max_length = 1024  # tokens of prompt + response
    c.batch_pairs = 8  # a training step, on both sides
    c.prompts = 256  # to generate from, pieces of 20 to 200 tokens of the responses' text
    c.new_tokens = 128  # of each; in `generate_ends` at most, about a quarter on average
    c.layers = 6  # of the random model
    c.growth = (1, 2, 4)  # times 512 tokens, 4,096 words, 1 row

    if preset == "tiny":
        c.num_pairs = 24
        c.max_length = 256
        c.prompts = 8
        c.new_tokens = 8
        c.layers = 2
        c.growth = (1, 2)
    elif preset:
        raise ValueError(f"unknown preset {preset!r}; choose tiny or none")
    return c
