"""Token weights from contrast of contexts (MuSC, arXiv 2502.11541): how much a token depends on the constraints.

    python -m launch.musc_token_weights --config=configs/musc_token_weights.py --config.model=DIR \
        --config.input=pairs.jsonl --config.output=weighed.jsonl

Expect: weighed.weights, a store that fills batch by batch, then weighed.jsonl: the rows with the column `token_weights`
that points at it. `launch.musc_train` on weighed.jsonl uses them. The same command goes on after an interruption.
Presets: `:tiny` for a small model on a laptop.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(preset: str = "") -> ConfigDict:
    c = ConfigDict()
    c.model = placeholder(str)  # the seed model: Hugging Face directory, hub id or run directory
    c.input = placeholder(str)  # preference rows with `perturbed_prompt`
    c.columns = ""  # ours=yours: "prompt=question,chosen=best" (docs/data.md); none: by their own names
    c.max_dropped_share = 0.01  # of a file's rows that may be faulty and are left out; with more nothing is written
    c.output = placeholder(str)  # JSONL, local, gs:// or s3://; appears when the store is whole
    c.chat_template_kwargs = ""  # JSON for the chat template: {"enable_thinking": false}; a row's own column goes first
    c.store = placeholder(str)  # local, gs:// or s3://; none: beside the output, as NAME.weights
    # calibrated_entropy | other_over_own | uniform | entropy | perplexity | kl | symmetric_kl | pmi | shuffled,
    # several with commas between, or all; training takes the first unless told otherwise (weights=store:RULE)
    c.rules = "calibrated_entropy"
    c.keep_scores = False  # keep log-probs and entropies under each context too, to look at; not needed for training
    c.seed = 0  # only read by shuffled
    c.dtype = "float32"  # exact; bfloat16 is faster on accelerators, and its entropy ratios are coarser
    c.max_length = 2048  # tokens of prompt + response: the same as in training, or cut responses will not fit

    c.batch = ConfigDict()
    c.batch.rows = 8  # a forward pass, over all devices
    c.batch.row_length = 6144  # 3 x max_length: a response under three prompts; long rows also leave little padding

    c.mesh = ConfigDict()
    c.mesh.data = 1
    c.mesh.fsdp = -1  # all devices
    c.mesh.tensor = 1

    c.compute = ConfigDict()
    c.compute.dtype = c.get_ref("dtype")
    c.compute.remat = "none"  # no gradient, nothing to recompute
    c.compute.attention = "auto"  # the platform's kernel
    c.compute.logprob_chunk = 256  # tokens a row whose logits exist at once
    c.compute.scan_unroll = 1  # a forward pass gains nothing from more

    if preset == "tiny":
        c.max_length = 1024  # as the training's preset
        c.batch.rows = 4
        c.batch.row_length = 3072
    elif preset:
        raise ValueError(f"unknown preset {preset!r}; choose tiny or none")
    return c
