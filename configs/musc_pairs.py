"""Preference pairs that a model makes by itself (MuSC, arXiv 2502.11541): pairs that differ in constraints.

    python -m launch.musc_pairs --config=configs/musc_pairs.py --config.model=DIR --config.input=instructions.jsonl \
        --config.output=pairs.jsonl

Expect: a line for each stage, then a table that says how many rows were dropped where and why. `pairs.jsonl` is for
`launch.musc_train` (or TRL's DPOTrainer); beside it lie `pairs.jsonl.counts.json` (the table),
`pairs.jsonl.dropped.jsonl` (the rows that were dropped) and `pairs.jsonl.stages/` (the model's answers). Answers are
kept as they finish: the same command continues a run that was interrupted, and ends with the same bytes as if it had
not been.

`--config.method` makes the pairs of a baseline that MuSC is compared with, from the same instructions and model.
self_reward: several responses, each scored 1 to 5 as a whole, best against worst. branch_solve_merge: the same, scored
by the share of the instruction's constraints that they meet. self_correct: the model's revision of its response
against that response. They answer the instruction as it was given and have no `perturbed_prompt`: train them with
uniform weights, as `launch.musc_train` does by itself.

Without instructions of your own: `--config.num_instructions=1000` instead of `--config.input`. Behind an
OpenAI-compatible server: `--config.endpoint.url=http://localhost:8000/v1 --config.endpoint.model=NAME` instead of
`--config.model`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    c = ConfigDict()
    # musc | self_reward | branch_solve_merge | self_correct: the last three are baselines that MuSC is compared with
    c.method = "musc"
    c.model = placeholder(str)  # Hugging Face directory, hub id or run directory; none with an endpoint
    c.input = placeholder(str)  # rows with `prompt` or `instruction` (and `input`); none: the model invents them
    c.num_instructions = placeholder(int)  # how many it invents; only without input
    c.columns = ""  # ours=yours: "instruction=question" (docs/data.md); none: by their own names
    c.max_dropped_share = 0.01  # of a file's rows that may be faulty and are left out; with more nothing is written
    c.output = placeholder(str)  # a local .jsonl; appears when it is whole
    c.chat_template_kwargs = ""  # JSON for the chat template: {"enable_thinking": false}; a row's own column goes first
    c.seed = 0  # with a row's id it decides every random draw
    c.dtype = "float32"  # CPUs are no faster in bfloat16; accelerators are, in half the memory
    c.examples = ""  # decomposed instructions in InFoBench's format; empty: the ten that come with the package
    c.num_examples = 4  # in-context examples of a prompt; a small model needs them, each costs about 150 tokens
    c.format = "auto"  # messages | text | auto: messages where the model has a chat template
    c.system = True  # the task as a system message; False: in the first user's, for an endpoint whose template has none
    c.text_template = (
        "Instruction:\n{instruction}\n\nResponse:\n"  # of a prompt in format text; base models need a frame
    )
    # What the chosen side answers. recombined, as in the paper: both sides are in the model's words and differ in their
    # constraints alone. original: the user's own words, and one call fewer a row; the sides then differ in style too.
    c.full_instruction = "recombined"
    c.near_duplicate = 0.7  # instructions that share this part of their word trigrams are one (Jaccard); 0: off
    c.verify = False  # ask whether both instructions ask for just what they should: two short calls more a row
    c.num_samples = 4  # responses that self_reward and branch_solve_merge choose among; the Self-Rewarding paper's
    c.judge_samples = 3  # verdicts on each of them, averaged; the same paper's. 1 is cheapest and ties more often
    c.max_failed_share = 0.05  # of a stage's requests; more without an answer are no accident: stop with an error

    c.perturb = ConfigDict()
    c.perturb.ratio = 0.3  # of a row's constraints, at least one, never the task itself; the paper's
    c.perturb.drop = 1.0  # shares of the three ways, which sum to 1; the authors' scripts come down to drops alone
    c.perturb.substitute = 0.0  # by a constraint of another row
    c.perturb.negate = 0.0  # by one that contradicts it, which the model writes; the paper's shares: 0.5, 0.25, 0.25

    # Low temperatures where there is one right answer, the authors' 0.5 where there are many
    c.decompose = _stage(0.1, 1024)  # the constraints, and the instruction's input once more
    c.self_instruct = _stage(0.5, 1024)
    c.negate = _stage(0.1, 128)  # one sentence
    c.recombine = _stage(0.1, 512)  # an instruction without its input
    c.check = _stage(0.0, 256)  # yes or no
    c.respond = _stage(0.5, 1024)  # a longer response is cut, and its pair dropped
    # The Self-Rewarding paper's temperature; verdicts that are averaged must be able to differ. A few sentences and a
    # number, or yes and no for every constraint
    c.judge = _stage(0.7, 512)
    c.critique = _stage(0.1, 512)  # a list of faults
    c.revise = _stage(0.5, 1024)  # as the response that it replaces

    c.decode = ConfigDict()
    c.decode.slots = 8  # answers written at once; more is faster until memory ends
    c.decode.max_length = 4096  # tokens of prompt + answer that a slot holds; the examples are in every prompt
    c.decode.chunk = 16  # tokens between two looks at what has finished

    c.endpoint = ConfigDict()
    c.endpoint.url = ""  # as http://localhost:8000/v1; empty: the model runs here
    c.endpoint.model = ""  # the name that the server gives it
    c.endpoint.concurrency = 32  # requests under way at once, which the server batches
    c.endpoint.timeout = 600.0  # seconds that one request may take

    c.mesh = ConfigDict()
    c.mesh.data = 1
    c.mesh.fsdp = -1  # all devices
    c.mesh.tensor = 1

    c.compute = ConfigDict()
    c.compute.dtype = c.get_ref("dtype")
    c.compute.remat = "none"  # no gradient, nothing to recompute
    c.compute.attention = "auto"  # the platform's kernel
    c.compute.logprob_chunk = 256  # not read here
    c.compute.scan_unroll = 1  # layers compiled together
    return c


def _stage(temperature: float, max_new_tokens: int, repetition_penalty: float = 1.0) -> ConfigDict:
    return ConfigDict(
        {"temperature": temperature, "max_new_tokens": max_new_tokens, "repetition_penalty": repetition_penalty}
    )
