"""Per-token log-probs and entropies of responses.

    python -m launch.score --config=configs/score.py --config.model=DIR --config.input=rows.jsonl \
        --config.output=scored.jsonl

Expect: the rows in their order, each with `logprob`, `num_tokens`, `token_logprobs`, `token_entropies` (nats).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.model = placeholder(str)  # Hugging Face directory, hub id or run directory
    c.input = placeholder(str)  # rows with `prompt` and `response`, or a list of responses as launch.generate writes
    c.columns = ""  # ours=yours: "prompt=question,response=answer" (docs/data.md); none: by their own names
    c.max_dropped_share = 0.01  # of a file's rows that may be faulty and are left out; with more nothing is written
    c.output = placeholder(str)  # JSONL, local, gs:// or s3://; appears when it is whole
    c.chat_template_kwargs = ""  # JSON for the chat template: {"enable_thinking": false}; a row's own column goes first
    c.dtype = "float32"  # exact; bfloat16 is faster on accelerators
    c.max_length = 2048  # tokens of prompt + response; longer responses are cut

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
    return c
