"""What MAIN (arXiv 2504.12913) is compared with, in one command: what of it helps, and what each part costs.

    python -m launch.main_controls --config=configs/main_controls.py --config.model=DIR --config.seeds=seeds.jsonl \
        --config.unlabelled=responses.jsonl --config.output=runs/main_controls

Expect: a share of the seeds is set aside; the other commands run one after the other, each with the line that runs it
(rounds, filter, verdicts, then a training and an evaluation for each arm); at the end a table, a line an arm: its
pairs, its loss on the held-out seeds, the difference to `seed_only` with an interval, its cost. `runs/main_controls`
then has `controls.md` (the tables), `controls.json` (their numbers) and `controls.png`. The same command goes on after
an interruption; what is done is not done again, and more arms may be added.

The intervals say how the held-out rows vary, not how trainings of other seeds would: give `seed` other values for that,
each with an output of its own. All arms train for the same epochs, so those of fewer pairs make fewer steps.

Every setting of the commands is a key here, with its default and its reason in the file of that name:
`--config.rounds.forward.epochs=2`, `--config.train.optim.learning_rate=2e-5`. Presets: `:tiny` for a small model on a
laptop. Each step compiles anew, unless the environment's `JAX_COMPILATION_CACHE_DIR` names a directory.
"""

import runpy

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(preset: str = "") -> ConfigDict:
    c = ConfigDict()
    c.model = placeholder(str)  # Hugging Face directory, hub id or run directory: what every training begins as
    c.seeds = placeholder(str)  # real pairs: `instruction` + `output`, `prompt` + `response`, or `messages`
    c.unlabelled = placeholder(str)  # rows with `id`, `response`, as launch.main_prepare writes them
    c.columns = ""  # of `seeds`, ours=yours: "instruction=ask,output=answer" (docs/data.md)
    c.unlabelled_columns = ""  # the same of `unlabelled`: "response=text"
    c.max_dropped_share = 0.01  # of a file's rows that may be faulty and are left out; with more nothing is written
    c.output = placeholder(str)  # directory
    c.chat_template_kwargs = ""  # JSON for every chat template: {"enable_thinking": false}
    c.seed = 0  # of every draw, every sampling and every training
    c.held_out = 0.2  # of the seeds; none of them is trained on, and every arm is measured on them
    # What to compare, `seed_only` among it; what the filter's own score, alpha and rounds do anyway is trained once.
    # Leaving out rounds_3 saves the longest round
    c.arms = (
        "seed_only",
        "no_filter",  # one drawn candidate of every response
        "random",  # as many of those as the filter keeps
        "score",  # as many by a score from 1 to 5 that the model itself writes
        "forward",  # as many by each score of launch.main_filter
        "reverse",
        "mutual",
        "forward_gain",
        "mutual_gain",
        "shuffled",  # what the filter keeps, with the responses exchanged: is learning the format all that helps?
        "alpha_fixed",  # what the filter keeps, by each rule of alpha
        "alpha_loss_ratio",
        "alpha_inverse_ratio",
        "alpha_schedule",
        "rounds_0",  # what the filter keeps of round 1's candidates by round 0's models, which know the seeds alone
        "rounds_1",  # what it keeps of a round's candidates by that round's models
        "rounds_2",
        "rounds_3",
    )

    # rounds: those of the other arms
    c.rounds = _settings("main_rounds", preset, "model seeds unlabelled output chat_template_kwargs seed")
    c.filter = _settings("main_filter", preset, "forward reverse input output chat_template_kwargs scores prompts")
    c.train = _settings(
        "main_train", preset, "model input eval_input output chat_template_kwargs seed train_on response_column"
    )
    c.evaluation = _settings("score", "", "model input output chat_template_kwargs")
    if preset == "tiny":
        c.evaluation.max_length = c.train.max_length
        c.evaluation.batch.row_length = c.train.max_length

    c.judge_model = placeholder(str)  # writes the scores of the arm `score`, same tokenizer; none: config.model
    c.judge_question = (
        "Below are an instruction and a response to it. Score how well the response answers the instruction: 1 is not "
        "at all, 5 is perfectly. Write the number alone.\n\n"
        "Instruction:\n{instruction}\n\nResponse:\n{response}\n\nScore:"
    )
    c.judge = _settings("generate", "", "model input output chat_template_kwargs seed num_samples endpoint")
    c.judge.max_new_tokens = 16  # a number, and what some say before it
    c.judge.temperature = 0.0  # the likeliest score
    return c


def _settings(name: str, preset: str, set_by_controls: str) -> ConfigDict:
    """What the neighbouring config file says, without the keys that the controls set themselves."""
    get = runpy.run_path(__file__.removesuffix("main_controls.py") + f"{name}.py")["get_config"]
    config = get(preset) if preset else get()
    for key in set_by_controls.split():
        del config[key]
    if "checkpoints" in config:
        del config.checkpoints["remote"]  # a copy is of one run
    return config
