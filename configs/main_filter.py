"""Mutual filter (MAIN, arXiv 2504.12913): which candidate instructions go with their responses, by two models.

    python -m launch.main_filter --config=configs/main_filter.py --config.forward=runs/forward \
        --config.reverse=runs/reverse --config.input=candidates.jsonl --config.output=kept.jsonl

Expect: three passes with their speed, then a table: the scores, kept responses by length, how much the instructions
copy, and why candidates were dropped. `kept.jsonl` are supervised rows for `launch.main_train`; beside it lie
`kept.jsonl.candidates.jsonl` (every candidate, its scores, what became of it), `kept.jsonl.report.json` and
`kept.jsonl.plots/`. What the models said is kept in `kept.jsonl.scores/` as it comes: the same command goes on after an
interruption and ends with the same bytes; another score, fraction, threshold or cluster reads it again and scores
nothing. Presets: `:tiny` for a small model on a laptop.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(preset: str = "") -> ConfigDict:
    c = ConfigDict()
    c.forward = placeholder(str)  # instruction -> response: run directory, Hugging Face directory or hub id
    c.reverse = placeholder(str)  # response -> instruction, likewise, with the same tokenizer
    c.input = placeholder(str)  # rows with `id` (the response's), `response`, `instruction`; a candidate a row
    c.columns = ""  # ours=yours: "id=key,response=text" (docs/data.md); none: by their own names
    c.max_dropped_share = 0.01  # of a file's rows that may be faulty and are left out; with more nothing is written
    c.output = placeholder(str)  # a local .jsonl; the kept pairs
    c.chat_template_kwargs = ""  # JSON for the chat template of both: {"enable_thinking": false}
    c.scores = placeholder(str)  # directory of what the models said; none: beside the output. Runs may share it
    # forward | reverse | mutual | forward_gain | mutual_gain; the published rule is not known. The default did best on
    # small models: without the response's own likelihood the filter prefers easy responses
    c.score = "mutual_gain"
    c.fraction = 0.5  # of the responses, by their best candidates; 1: all of them
    c.threshold = placeholder(float)  # the highest score to keep, besides; none: any
    c.cluster = placeholder(str)  # column that groups responses: the fraction then holds within each group; none: off
    c.dtype = "float32"  # exact; bfloat16 is faster on accelerators
    c.max_length = 2048  # tokens of prompt + response; what is longer is dropped and counted, never cut

    # As the two models were trained
    c.prompts = ConfigDict()
    c.prompts.format = "auto"  # messages | text | auto: messages where the model has a chat template
    c.prompts.seed_system = "Answer as a helpful assistant does."  # tag of seed rows; also the one to use afterwards
    c.prompts.synthetic_system = "Answer as a text found on the web does."  # tag of rows with a written instruction
    c.prompts.reverse_system = ""  # the question below says it all
    c.prompts.reverse_question = (
        "Below is a response that an assistant gave. Write the one instruction, question or request that it answers, "
        "and nothing else.\n\nResponse:\n{response}"
    )
    c.prompts.forward_text = "{system}\n\nInstruction:\n{instruction}\n\nResponse:\n"  # frames for base models
    c.prompts.reverse_text = "{system}\n\nResponse:\n{response}\n\nInstruction:\n"

    c.batch = ConfigDict()
    c.batch.rows = 8  # a forward pass, over all devices
    c.batch.row_length = 2048  # at least max_length

    c.mesh = ConfigDict()
    c.mesh.data = 1
    c.mesh.fsdp = -1  # all devices
    c.mesh.tensor = 1

    c.compute = ConfigDict()
    c.compute.dtype = c.get_ref("dtype")
    c.compute.remat = "none"  # no gradient, nothing to recompute
    c.compute.attention = "auto"  # the platform's kernel
    c.compute.logprob_chunk = 256  # tokens of a device whose logits exist at once (by 8,192 words of the vocabulary)
    c.compute.scan_unroll = 1  # not read here: a forward pass gains nothing from more

    if preset == "tiny":
        c.max_length = 1024
        c.batch.rows = 4
        c.batch.row_length = 1024
    elif preset:
        raise ValueError(f"unknown preset {preset!r}; choose tiny or none")
    return c
