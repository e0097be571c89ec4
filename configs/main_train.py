"""Supervised tuning on seed and synthetic pairs (MAIN, arXiv 2504.12913), or on plain supervised rows.

    python -m launch.main_train --config=configs/main_train.py \
        --config.model=HF_DIR --config.input=rows.jsonl --config.output=runs/main

Expect: a loss that begins at the model's own cross-entropy and falls, and a `mean_token_accuracy` that grows. Rows with
`source` synthetic beside seed ones add `alpha`, `loss/seed` and `loss/synthetic`; without them it is plain tuning.
The same command continues a run that was interrupted. Presets: `:tiny` for a small model on a laptop, and for pods
`:llama3_8b`, `:qwen2_5_32b`, `:llama3_70b`, `:llama3_70b_lora`; what they take of which pod:

    python -m launch.plan --config=configs/main_train.py:llama3_8b --topology=v5e:8x8
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

# Model, tensor parts, rank of adapters, remat policy; planned for the pod that stands behind
_PODS = {
    "llama3_8b": ("meta-llama/Meta-Llama-3-8B", 1, 0, "full"),  # v5e:8x8
    "qwen2_5_32b": ("Qwen/Qwen2.5-32B", 1, 0, "save_matmuls"),  # v5p:4x4x4
    "llama3_70b": ("meta-llama/Meta-Llama-3-70B", 8, 0, "save_matmuls"),  # v5p:8x8x8
    "llama3_70b_lora": ("meta-llama/Meta-Llama-3-70B", 1, 16, "full"),  # v6e:8x8
}


def get_config(preset: str = "") -> ConfigDict:
    c = ConfigDict()
    c.model = placeholder(str)  # Hugging Face directory, hub id or run directory: where training starts
    c.input = placeholder(str)  # supervised rows: .jsonl .json .parquet, a saved dataset, or a hub id
    c.eval_input = placeholder(str)  # held-out supervised rows; none: no evaluation
    c.columns = ""  # ours=yours: "instruction=ask,output=answer" (docs/data.md); none: by their own names
    c.max_dropped_share = 0.01  # of a file's rows that may be faulty and are left out; with more nothing is written
    c.output = placeholder(str)  # run directory
    c.chat_template_kwargs = ""  # JSON for the chat template: {"enable_thinking": false}; a row's own column goes first
    c.seed = 0  # of the data order
    c.dtype = "bfloat16"  # matmuls and activations; master weights, softmax and losses are fp32
    c.max_length = 2048  # tokens of prompt + response; longer responses are cut
    c.epochs = 3  # usual for some thousand pairs
    c.max_steps = placeholder(int)  # stop early; none: all epochs
    c.eval_every = 100  # steps
    c.train_on = "all"  # of a conversation: all of the assistant's turns, or the last alone
    c.response_column = placeholder(str)  # learn this column; `chosen` tunes on preference rows; none: the layout's own

    c.alpha = ConfigDict()  # weight of the synthetic loss; read where the rows are of both sources
    c.alpha.rule = "loss_ratio"  # CE_seed / (CE_seed + CE_synthetic) | inverse_ratio | fixed | schedule
    c.alpha.value = 0.5  # of fixed
    c.alpha.start = 0.0  # schedule begins with the seed pairs alone
    c.alpha.end = 0.5  # and ends with both alike
    c.alpha.decay = 0.9  # moving averages of the losses over some ten steps: a step's own is noisy

    c.batch = ConfigDict()
    c.batch.examples = 32  # rows of the input a step, as instruction backtranslation has it (arXiv 2308.06259)
    # Packed rows of up to 2 x max_length tokens that a device works on at one time; a step takes as many microbatches
    # of them as it needs, with the same result. More are faster for small models, as far as memory allows
    c.batch.rows_per_device = 1
    c.batch.row_lengths = 3  # different lengths of rows, at most: each leaves less padding and takes a compilation

    c.optim = ConfigDict()
    c.optim.learning_rate = 1e-5  # full fine-tuning of a 7B-class model; adapters take ten times as much
    c.optim.schedule = "cosine"
    c.optim.warmup_ratio = 0.03  # the losses of a model that can already write are tame
    c.optim.final_ratio = 0.0  # decay to zero, as transformers' cosine does
    c.optim.beta1 = 0.9
    c.optim.beta2 = 0.999
    c.optim.eps = 1e-8
    c.optim.weight_decay = 0.0  # few epochs
    c.optim.clip_norm = 1.0
    c.optim.mu_dtype = "auto"  # of first moments: float32 | bfloat16; auto: the parameters'
    # Steps of the whole run whose loss or gradient may be NaN or infinite: they change nothing, and the data go on. A
    # few are a freak batch, more are a fault; 0 stops at the first
    c.optim.skip_limit = 5

    c.lora = ConfigDict()
    c.lora.rank = 0  # 0 trains every parameter; 16 or so trains adapters, where a state of the whole does not fit
    c.lora.alpha = 32.0  # the adapters' product is scaled by alpha / rank
    c.lora.targets = "all-linear"  # or some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj
    c.lora.rslora = False  # scale by alpha / sqrt(rank), for large ranks
    c.lora.dropout = 0.0  # 0.05 to 0.1 where few rows are gone over many times; the masks take time
    c.lora.base = "full"  # nf4 keeps the frozen projections in 4 bits (QLoRA; needs qwix): a quarter of bf16's memory

    c.mesh = ConfigDict()
    c.mesh.data = 1  # replicate only when fsdp's gathers cross slow links
    c.mesh.fsdp = -1  # all devices
    c.mesh.tensor = 1  # raise when one layer's activations do not fit

    c.compute = ConfigDict()
    c.compute.dtype = c.get_ref("dtype")
    c.compute.remat = "full"  # least memory; `none` is fastest where it fits
    c.compute.attention = "auto"  # the platform's kernel
    c.compute.logprob_chunk = 256  # tokens of a device whose logits exist at once (by 8,192 words of the vocabulary)
    c.compute.scan_unroll = 1  # layers compiled together; all of them is fastest for a small model on a CPU

    c.checkpoints = ConfigDict()
    c.checkpoints.every = 100  # steps lost at most when a machine dies
    c.checkpoints.keep = 2  # the newest, and one to fall back to
    c.checkpoints.remote = placeholder(str)  # gs:// or s3:// copy, from which another machine goes on; none: no copy

    c.loggers = ""  # besides metrics.jsonl and TensorBoard: some of wandb, trackio, mlflow, commas between
    c.profile = placeholder(str)  # FIRST:LAST, steps to trace into the run directory; the first one compiles

    if preset == "tiny":
        c.dtype = "float32"  # CPUs are no faster in bfloat16
        c.max_length = 1024
        c.epochs = 1
        c.optim.learning_rate = 1e-3
        c.compute.remat = "none"
        c.compute.scan_unroll = 64  # all layers
        c.checkpoints.every = 50
    elif preset in _PODS:
        c.model, c.mesh.tensor, c.lora.rank, c.compute.remat = _PODS[preset]
        c.compute.logprob_chunk = 1024  # a block of the embedding is read from memory once for so many tokens
        c.batch.examples = 512  # eight for each of fsdp's 64 parts: with fewer they would wait for each other
        if c.lora.rank:
            c.optim.learning_rate = 1e-4  # adapters take ten times as much
    elif preset:
        raise ValueError(f"unknown preset {preset!r}; choose tiny, {', '.join(_PODS)} or none")
    return c
