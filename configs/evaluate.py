"""Benchmarks: lm-eval's tasks for models side by side, IFEval for responses in a file, and benchmarks with a judge.

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

Both need the extra: pip install -e '.[eval]'. What follows does not.

    python -m launch.evaluate --config=configs/evaluate.py:cfbench --config.input=cfbench.json \
        --config.responses=answers.jsonl --config.judge.endpoint.url=http://localhost:8000/v1 \
        --config.judge.endpoint.model=Qwen/Qwen3-32B --config.output=results/cfbench

`answers.jsonl` has rows with `prompt` (the instruction's text) and `response`; `instruction` and `output` do too. With
`config.model=DIR`, or `config.endpoint.url` and `.model`, in place of `config.responses` the responses are written
first. `config.judge.model=DIR` is a judge that runs here. Presets, and what `input` is:

    cfbench       CFBench's data file                      CSR, ISR, PSR; by difficulty and type of requirement
    followbench   FollowBench's data directory, or a file  HSR and SSR by level, CSL; by category
    complexbench  rows with `instruction` and              share of questions answered with yes; by type
                  `scoring_questions`
    pairwise      outputs of a reference, as AlpacaEval    win rate, each pair judged in both orders; no correction
                  has them: `instruction`, `output`        for length

Expect: a line with the judge's calls and tokens before it is asked, then a table with 95% intervals; in
`results/cfbench` also `scores.json`, every verdict (`verdicts.jsonl`) and what the judge said (`judge_answers.jsonl`).
A verdict that cannot be read is counted, and its instruction is left out of the scores. The same command goes on after
an interruption.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

_JUDGED = ("cfbench", "followbench", "complexbench", "pairwise")


def get_config(preset: str = "") -> ConfigDict:
    if preset == "ifeval_files":
        return _ifeval_files()
    if preset in _JUDGED:
        return _judged(preset)
    if preset:
        raise ValueError(f"unknown preset {preset!r}; choose ifeval_files, {', '.join(_JUDGED)} or none")
    c = ConfigDict()
    c.models = placeholder(str)  # Hugging Face or run directories or hub ids, commas between; the first is "before"
    c.tasks = placeholder(str)  # names that `lm-eval ls tasks` shows, or YAML files, commas between
    c.include_path = placeholder(str)  # directory with more task files, which then count by name
    c.output = placeholder(str)  # directory
    c.limit = placeholder(int)  # first questions of each task; none: all. For trying things out
    c.num_fewshot = placeholder(int)  # examples before each question; none: what the task says
    c.apply_chat_template = False  # true for instruct models, as in lm-eval; base models have no template
    c.chat_template_kwargs = ""  # JSON for the chat template: {"enable_thinking": false}
    c.think_end_token = "</think>"  # answers are scored without their thoughts, up to here; empty: whole
    c.seed = 0  # of tasks that sample; nearly all are greedy
    c.dtype = "float32"  # CPUs are no faster in bfloat16; accelerators are, in half the memory
    c.max_length = 2048  # tokens of question + answer; longer ones lose their beginning, as in lm-eval

    c.batch = ConfigDict()
    c.batch.rows = 4  # a scoring pass, over all devices
    c.batch.row_length = 4096  # more than max_length; several questions share a row

    _here(c, c.get_ref("max_length"))
    c.compute.logprob_chunk = 256  # tokens of a device whose logits exist at once (by 8,192 words of the vocabulary)
    return c


def _ifeval_files() -> ConfigDict:
    c = ConfigDict()
    c.prompts = placeholder(str)  # rows with `prompt`, `instruction_id_list`, `kwargs`, as google/IFEval has them
    c.responses = placeholder(str)  # rows with `prompt` (the same text) and `response`, in any order
    c.output = placeholder(str)  # JSON; appears when it is whole
    c.allow_missing = False  # true leaves prompts without a response out of the scores; else they are an error
    c.think_end_token = "</think>"  # responses are scored without their thoughts, up to here; empty: whole
    return c


def _judged(benchmark: str) -> ConfigDict:
    c = ConfigDict()
    c.benchmark = benchmark  # the preset's name
    c.input = placeholder(str)  # the benchmark's file, or FollowBench's directory
    c.responses = placeholder(str)  # rows with `prompt` and `response`, in any order; none with a model
    c.output = placeholder(str)  # directory
    c.name = "model"  # what tables, and AlpacaEval's `generator`, call who wrote the responses
    c.limit = placeholder(int)  # first rows of each input file; none: all. For trying things out
    c.allow_missing = False  # true leaves instructions without a response out of the scores; else they are an error
    c.cost_only = False  # true stops before the judge is asked
    c.seed = 0  # of every random draw; with temperature 0 there is none
    c.max_failed_share = 0.05  # more answers than this that fail are no accident: stop with an error

    c.model = placeholder(str)  # writes the responses: Hugging Face directory, hub id or run directory
    _model(c, max_length=4096)
    c.apply_chat_template = True  # false gives the instruction as raw text, for base models
    c.chat_template_kwargs = ""  # JSON for the chat template: {"enable_thinking": false}
    c.think_end_token = "</think>"  # responses are judged without their thoughts, up to here; empty: whole
    c.max_new_tokens = 2048  # of a response
    c.temperature = 0.0  # the likeliest tokens, so that a run can be repeated

    c.judge = ConfigDict()
    c.judge.model = placeholder(str)  # as above; an instruct model, it is asked through its chat template
    _model(c.judge, max_length=8192)
    c.judge.chat_template_kwargs = ""  # as above, for the judge; its thoughts up to </think> are no verdict anyway
    c.judge.max_new_tokens = 1024  # a sentence for each of ten requirements takes some 400
    c.judge.temperature = 0.0  # verdicts that can be repeated
    c.judge.prompt_price = 0.0  # of a million tokens that the judge reads, in your currency; 0: not known
    c.judge.answer_price = 0.0  # of a million tokens that it writes
    return c


def _model(c: ConfigDict, max_length: int) -> None:
    c.dtype = "float32"  # CPUs are no faster in bfloat16; accelerators are, in half the memory

    c.endpoint = ConfigDict()
    c.endpoint.url = ""  # as http://localhost:8000/v1; empty: the model runs here. A key goes into OPENAI_API_KEY
    c.endpoint.model = ""  # the name that the server gives it
    c.endpoint.concurrency = 32  # requests under way at once, which the server batches
    c.endpoint.timeout = 600.0  # seconds that one request may take

    _here(c, max_length)


def _here(c: ConfigDict, max_length: object) -> None:
    """Settings of a model that runs here."""
    c.decode = ConfigDict()
    c.decode.slots = 64  # answers written at once, over all devices; more keeps accelerators busier, in more memory
    c.decode.max_length = max_length  # tokens of prompt + answer that a slot holds
    c.decode.chunk = 8  # tokens between two looks at what has finished

    c.mesh = ConfigDict()
    c.mesh.data = 1  # copies of the model; -1 here and tensor=1 is fastest where a device holds it whole
    c.mesh.fsdp = 1  # cuts parameters that every token would gather anew: last resort
    c.mesh.tensor = -1  # all devices cut each layer

    c.compute = ConfigDict()
    c.compute.dtype = c.get_ref("dtype")
    c.compute.remat = "none"  # no gradient, nothing to recompute
    c.compute.attention = "auto"  # the platform's kernel
    c.compute.logprob_chunk = 256  # read where answers are scored, not where they are written
    c.compute.scan_unroll = 1  # layers compiled together
