"""MuSC in rounds (arXiv 2502.11541): pairs, token weights, training, and again with the model that came out.

    python -m launch.musc_rounds --config=configs/musc_rounds.py --config.model=DIR --config.input=instructions.jsonl \
        --config.output=runs/rounds

Expect: what `launch.musc_pairs`, `launch.musc_token_weights` and `launch.musc_train` say, once a round, then a table
with a line for each round: pairs, drops, loss, margin, accuracy, seconds. `runs/rounds/round_3/train` is the last run
directory, for `launch.export_hf`; `rounds.jsonl` the table. The same command goes on after an interruption, in the part
where it was; with a larger `rounds` and `instructions_per_round` given it adds rounds.

Every setting of the three commands is a key here, with its default and its reason in their own config file:
`--config.pairs.respond.temperature=0.7`, `--config.weights.rules=kl`, `--config.train.loss.beta=0.2`. Those that a
round sets itself are left out. The model runs here: a server would not have what the rounds train.
`--config.pairs.method=self_reward` makes rounds of a baseline. Presets: `:tiny` for a small model on a laptop.
Each round compiles its training step again, unless the environment's `JAX_COMPILATION_CACHE_DIR` names a directory.
"""

import runpy

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(preset: str = "") -> ConfigDict:
    c = ConfigDict()
    c.model = placeholder(str)  # Hugging Face directory, hub id or run directory: what round 1 begins with
    c.input = placeholder(str)  # rows with `prompt` or `instruction` (and `input`); none: the model invents them
    c.num_instructions = placeholder(int)  # how many it invents in every round; only without input
    c.columns = ""  # ours=yours: "instruction=question" (docs/data.md); none: by their own names
    c.max_dropped_share = 0.01  # of a file's rows that may be faulty and are left out; with more nothing is written
    c.output = placeholder(str)  # directory
    c.chat_template_kwargs = ""  # JSON for the chat template: {"enable_thinking": false}; a row's own column goes first
    c.seed = 0  # of round 1; each round adds 1, so that none repeats the draws of another
    c.rounds = 3  # each costs as much as a whole training
    # none: rows / rounds, so that every round sees instructions of its own, as iterated preference training has it
    # (a model answers better what it was trained on); 0: all of them in every round, for small sets
    c.instructions_per_round = placeholder(int)
    c.reference = "previous"  # the frozen model: what the round begins with; seed: `model`, in every round

    c.pairs = _settings("musc_pairs", "", "model input num_instructions output chat_template_kwargs seed endpoint")
    c.weights = _settings("musc_token_weights", preset, "model input output chat_template_kwargs store seed")
    c.train = _settings("musc_train", preset, "model reference input output chat_template_kwargs seed reference_cache")
    return c


def _settings(name: str, preset: str, set_by_rounds: str) -> ConfigDict:
    """What the neighbouring config file says, without the keys that a round sets itself."""
    get = runpy.run_path(__file__.removesuffix("musc_rounds.py") + f"{name}.py")["get_config"]
    config = get(preset) if preset else get()
    for key in set_by_rounds.split():
        del config[key]
    if "checkpoints" in config:
        del config.checkpoints["remote"]  # a copy is of one run
    return config
