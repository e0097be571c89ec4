"""Benchmarks: lm-eval's tasks for one model or several side by side, and IFEval for responses in a file.

    python -m launch.evaluate --config=configs/evaluate.py --config.models=DIR,runs/musc \
        --config.tasks=ifeval,arc_easy --config.output=results

Expect: a line for every model and task, then a Markdown table: tasks and metrics down, models across, with standard
errors and the difference between the last and the first. `results/` gets it as `table.md` and `table.json`, and of each
(model, task) lm-eval's numbers and, in `.samples.jsonl`, every question with its answer. The same command goes on after
an interruption with the tasks that are missing; more models or tasks may be added. Data of the tasks come from the hub,
those of a task of your own (`--config.tasks=my_task.yaml`) from where its file says.

    python -m launch.evaluate --config=configs/evaluate.py:ifeval_files --config.prompts=prompts.jsonl \
        --config.responses=answers.jsonl --config.output=ifeval.json

needs no model: `answers.jsonl` are rows with `prompt` and `response`, from `launch.generate` or elsewhere. Expect: one
line of JSON with the four accuracies of IFEval (arXiv 2311.07911), and in `ifeval.json` also those of each kind of
instruction.

Both need the extra: pip install -e '.[eval]'.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(preset: str = "") -> ConfigDict:
    if preset == "ifeval_files":
        return _ifeval_files()
    if preset:
        raise ValueError(f"unknown preset {preset!r}; choose ifeval_files or none")
    c = ConfigDict()
    c.models = placeholder(str)  # Hugging Face or run directories or hub ids, commas between; the first is "before"
    c.tasks = placeholder(str)  # names that `lm-eval ls tasks` shows, or YAML files, commas between
    c.include_path = placeholder(str)  # directory with more task files, which then count by name
    c.output = placeholder(str)  # directory
    c.limit = placeholder(int)  # first questions of each task; none: all. For trying things out
    c.num_fewshot = placeholder(int)  # examples before each question; none: what the task says
    c.apply_chat_template = False  # true for instruct models, as in lm-eval; base models have no template
    c.seed = 0  # of tasks that sample; nearly all are greedy
    c.dtype = "float32"  # CPUs are no faster in bfloat16; accelerators are, in half the memory
    c.max_length = 2048  # tokens of question + answer; longer ones lose their beginning, as in lm-eval

    c.batch = ConfigDict()
    c.batch.rows = 4  # a scoring pass, over all devices
    c.batch.row_length = 4096  # more than max_length; several questions share a row
    c.batch.microbatches = 1  # nothing to accumulate
    c.batch.max_examples_per_row = 256  # answers to multiple-choice questions are short

    c.decode = ConfigDict()
    c.decode.slots = 64  # answers written at once, over all devices; more keeps accelerators busier, in more memory
    c.decode.max_length = c.get_ref("max_length")
    c.decode.chunk = 8  # tokens between two looks at what has finished

    c.mesh = ConfigDict()
    c.mesh.data = 1  # copies of the model; -1 here and tensor=1 is fastest where a device holds it whole
    c.mesh.fsdp = 1  # cuts parameters that every token would gather anew: last resort
    c.mesh.tensor = -1  # all devices cut each layer

    c.compute = ConfigDict()
    c.compute.dtype = c.get_ref("dtype")
    c.compute.remat = "none"  # no gradient, nothing to recompute
    c.compute.attention = "auto"  # the platform's kernel
    c.compute.logprob_chunk = 256  # tokens a row whose logits exist at once
    c.compute.scan_unroll = 1  # not read here: a forward pass gains nothing from more
    return c


def _ifeval_files() -> ConfigDict:
    c = ConfigDict()
    c.prompts = placeholder(str)  # rows with `prompt`, `instruction_id_list`, `kwargs`, as google/IFEval has them
    c.responses = placeholder(str)  # rows with `prompt` (the same text) and `response`, in any order
    c.output = placeholder(str)  # JSON; appears when it is whole
    c.allow_missing = False  # true leaves prompts without a response out of the scores; else they are an error
    return c
