"""MAIN's rounds (arXiv 2504.12913): a forward and a reverse model, each trained on what the other writes.

    python -m launch.main_rounds --config=configs/main_rounds.py --config.model=DIR --config.seeds=seeds.jsonl \
        --config.unlabelled=responses.jsonl --config.output=runs/main_rounds

Expect: two trainings on the seeds (round 0); then, once a round, instructions written for the unlabelled responses and
responses to the seeds' instructions, and two trainings on both; at the end a table with a line for each round and
model. `runs/main_rounds/round_2` then has what `launch.main_filter` takes: `candidates.jsonl`, `forward`, `reverse`;
`rounds.jsonl` is the table. The same command goes on after an interruption, in the part where it was; with a larger
`rounds` it adds rounds. The last training is `launch.main_train` on `round_0/forward.jsonl`, the seeds, joined (`cat`)
with what the filter keeps. Models that have learnt nothing beyond the seeds: filter `round_1/candidates.jsonl` with
`round_0/forward` and `round_0/reverse`.

Every setting of sampling and training is a key here, with its default and its reason in configs/generate.py and
configs/main_train.py: `--config.instructions.temperature=1.0`, `--config.forward.alpha.rule=fixed`. Those that a round
sets itself are left out. Two adapters on one frozen base: `--config.sharing=adapters --config.forward.lora.rank=16
--config.reverse.lora.rank=16`, and ten times the learning rate. Presets: `:tiny` for a small model on a laptop.
Each training compiles its step again, unless the environment's `JAX_COMPILATION_CACHE_DIR` names a directory.
"""

import runpy

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

_TRAINING = "model input eval_input output chat_template_kwargs seed train_on response_column"
_SAMPLING = "model input output chat_template_kwargs seed num_samples stop endpoint"


def get_config(preset: str = "") -> ConfigDict:
    c = ConfigDict()
    c.model = placeholder(str)  # Hugging Face directory, hub id or run directory: what both models begin as
    c.reverse_model = placeholder(str)  # the reverse model begins as this one instead; with the same tokenizer
    c.seeds = placeholder(str)  # real pairs: `instruction` + `output`, `prompt` + `response`, or `messages`
    c.unlabelled = placeholder(str)  # rows with `id`, `response`, as launch.main_prepare writes them
    c.columns = ""  # of `seeds`, ours=yours: "instruction=ask,output=answer" (docs/data.md)
    c.unlabelled_columns = ""  # the same of `unlabelled`: "response=text"
    c.max_dropped_share = 0.01  # of a file's rows that may be faulty and are left out; with more nothing is written
    c.output = placeholder(str)  # directory
    c.chat_template_kwargs = ""  # JSON for the chat template of both: {"enable_thinking": false}
    c.seed = 0  # of round 0; each round adds 1, so that none repeats the draws of another
    c.rounds = 2  # besides round 0; each costs two trainings, and on small models more of them changed nothing
    c.candidates = 4  # instructions a response: what the filter then chooses from
    # How many of a response's valid ones the forward model learns, each with its share of a weight of 1. None: all, so
    # that the filter's forward model prefers none for having learnt it; 1 takes the least time
    c.learnt_candidates = placeholder(int)
    # Every round's data have all seeds and all responses anew, so a start from the base loses nothing, does not go over
    # the seeds again and again, and leaves rounds to be compared; previous: go on from the round before
    c.start = "base"
    c.sharing = "full"  # two whole models | adapters: two LoRA adapters on one frozen base, anew in every round

    c.prompts = _file("main_filter", preset).prompts  # must be the same there
    c.instructions = _settings("generate", "", _SAMPLING)  # the reverse model writes
    c.instructions.max_new_tokens = 256  # more than any instruction that would be kept
    c.responses = _settings("generate", "", _SAMPLING)  # the forward model writes
    c.forward = _settings("main_train", preset, _TRAINING)
    c.reverse = _settings("main_train", preset, _TRAINING)
    return c


def _settings(name: str, preset: str, set_by_rounds: str) -> ConfigDict:
    """What the neighbouring config file says, without the keys that a round sets itself."""
    config = _file(name, preset)
    for key in set_by_rounds.split():
        del config[key]
    if "checkpoints" in config:
        del config.checkpoints["remote"]  # a copy is of one run
    return config


def _file(name: str, preset: str) -> ConfigDict:
    get = runpy.run_path(__file__.removesuffix("main_rounds.py") + f"{name}.py")["get_config"]
    return get(preset) if preset else get()
