"""What we take for a row. Run by `lab.bench.bench` as `peers.py` is: `python -m lab.bench.ours ROW JSON`.

Compilation is left out: what is measured is the second of its kind in the process.
"""

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lab.bench import material
from lm_jax.checkpoints.runs import open_model
from lm_jax.checkpoints.settings import training_records
from lm_jax.config import BatchConfig, ComputeConfig, DecodeConfig, MeshConfig, ModelConfig, RopeConfig
from lm_jax.data.packing import Segment
from lm_jax.data.tokenizers import load_tokenizer
from lm_jax.errors import UserError
from lm_jax.generation.requests import Request, SamplingConfig
from lm_jax.generation.sampling import LocalGenerator
from lm_jax.models.decoder import Decoder, output_embedding
from lm_jax.models.logprobs import token_logprobs
from lm_jax.scoring.scoring import score as score_segments
from lm_jax.sharding import make_mesh
from lm_jax.strict_json import dumps
from lm_jax.training.flops import forward_flops, peak_flops


def train(given: dict[str, Any]) -> dict[str, Any]:
    """Of `launch.musc_train` as a user runs it, with uniform weights; one pass of the reference is counted in."""
    settings = {
        "model": given["model"],
        "input": given["pairs"],
        "output": given["output"],
        "weights": "uniform",
        "dtype": given["dtype"],
        "max_length": given["max_length"],
        "batch.pairs": given["batch_pairs"],
    }
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "launch.musc_train", "--config=configs/musc_train.py:tiny", *flags]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    said = r"log-probs of \d+ responses in ([\d.]+) s \(first batch, with its compilation, ([\d.]+) s"
    found = re.search(said, done.stderr)
    if done.returncode or found is None:
        raise UserError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    reference, first = map(float, found.groups())
    steps = training_records(given["output"])
    if len(steps) < 2:
        raise UserError("row train: one step makes no steady state; give more pairs")
    tokens = np.diff([0, *(s["num_tokens"] for s in steps)])
    seconds = [n / s["tokens_per_second"] for n, s in zip(tokens, steps, strict=True)]
    # First steps and batches, which compile, are counted at the mean of the others
    batches = max(math.ceil(tokens.sum() / (jax.device_count() * 2 * given["max_length"])), 2)
    training = sum(seconds[1:]) * tokens.sum() / tokens[1:].sum()
    reference = (reference - first) * batches / (batches - 1)
    utilization = [s["model_flops_utilization"] for s in steps[1:] if "model_flops_utilization" in s]
    return {
        "seconds": training + reference,
        "training": training,
        "reference": reference,
        "tokens": int(tokens.sum() + 2 * sum(s["pairs"] for s in steps)),  # TRL counts each sequence's last token too
        "first_loss": steps[0]["loss"],
        "steps": len(steps),
        **({"model_flops_utilization": float(np.mean(utilization))} if utilization else {}),
    }


def generate(given: dict[str, Any], ends: bool = False) -> dict[str, Any]:
    """Greedy text, `material.budgets` tokens of every prompt; the best of two numbers of slots."""
    config, tokenizer, params, mesh = _opened(given)
    texts = material.prompts(given["pairs"], tokenizer, given["prompts"])
    budgets = material.budgets(len(texts), given["new_tokens"], ends)
    requests = [Request(str(i), text, max_new_tokens=n) for i, (text, n) in enumerate(zip(texts, budgets, strict=True))]
    sampling, seconds = SamplingConfig(given["new_tokens"], temperature=0.0), []
    for slots in (64, 128):
        decode = DecodeConfig(slots=slots, max_length=material.SLOT_LENGTH, chunk=8)
        generator = LocalGenerator(params, config, tokenizer, (), ComputeConfig(given["dtype"]), decode, mesh)
        for _ in range(2):
            begin = time.perf_counter()
            done = [c for group in generator.generate(requests, sampling) for c in group]
            took = time.perf_counter() - begin
        seconds.append(took)
    made = {c.id: c.samples[0] for c in done}
    return {
        "seconds": min(seconds),
        "tokens": sum(sample.num_tokens for sample in made.values()),
        "texts": [made[str(i)].text for i in range(len(texts))],
    }


def generate_ends(given: dict[str, Any]) -> dict[str, Any]:
    """The same where answers end by themselves, at different lengths, which are known here beforehand: they decide how
    long the slots are, and nothing else."""
    return generate(given, ends=True)


def score(given: dict[str, Any]) -> dict[str, Any]:
    """Log-probs of every response, packed; entropies too, as `launch.score` has them."""
    config, tokenizer, params, mesh = _opened(given)
    rows = material.responses(given["pairs"], tokenizer, tokenizer.eos_token_id, given["max_length"])
    segments = [Segment(np.array(prompt, np.int32), np.array(response, np.int32)) for prompt, response in rows]
    compute, parts = ComputeConfig(given["dtype"]), mesh.size
    batch = BatchConfig(2 * parts, max(given["max_length"], 1024))
    for _ in range(2):
        begin, total = time.perf_counter(), 0.0
        for group in score_segments(params, segments, config, compute, batch, mesh, True):
            total += sum(float(np.sum(s.logprobs, dtype=np.float64)) for s in group)
        seconds = time.perf_counter() - begin
    peak, flops = peak_flops(), forward_flops(config, np.array([len(p) + len(r) for p, r in rows]))
    return {
        "seconds": seconds,
        "tokens": sum(map(len, segments)),
        "sum": total,
        **({} if peak is None else {"model_flops_utilization": flops / seconds / peak}),
    }


def load(given: dict[str, Any]) -> dict[str, Any]:
    """Weights onto one device, in fp32, as the peer has them; the faster of two."""
    source, mesh = open_model(given["model"]), make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    leaves: list[jax.Array] = []
    before, seconds = material.forget_peak(), []
    for _ in range(2):  # memory that a virtual machine has not touched yet may take seconds to come
        leaves.clear()
        begin = time.perf_counter()
        leaves += jax.tree.leaves(jax.block_until_ready(source.load_params(mesh, "float32")))
        seconds.append(time.perf_counter() - begin)
    return {
        "seconds": min(seconds),
        "bytes": material.peak_memory() - before,
        "parameters": sum(x.size for x in leaves),
        "sum": sum(float(np.sum(np.asarray(x), dtype=np.float64)) for x in leaves),
    }


def growth(given: dict[str, Any]) -> dict[str, Any]:
    """Seconds and temporary bytes of forward and backward of a small model, as one of its sizes grows."""
    start = {"length": 512, "vocabulary": 4096, "rows": 1}
    points = []
    for axis in start:
        for factor in given["factors"]:
            sizes = start | {axis: start[axis] * factor}
            points.append({"axis": axis, **sizes, **_gradient(**sizes)})
    return {"points": points}


def _gradient(length: int, vocabulary: int, rows: int) -> dict[str, float]:
    model = ModelConfig("llama", vocabulary, 2, 128, 256, 4, 2, 32, RopeConfig(1e4), 1e-6, length)
    compute = ComputeConfig("float32", remat="full")
    ids = jnp.zeros((rows, length), jnp.int32)
    positions, segment_ids = ids + jnp.arange(length), ids + 1
    params = Decoder(model, compute).init(jax.random.key(0), ids, positions, segment_ids)["params"]

    def loss(params):
        hidden: Any = Decoder(model, compute).apply({"params": params}, ids, positions, segment_ids)
        embedding = output_embedding(params, model)
        return jnp.sum(token_logprobs(hidden, embedding, ids, segment_ids, compute.logprob_chunk, False)[0])

    step = jax.jit(jax.grad(loss)).lower(params).compile()
    memory: Any = step.memory_analysis()
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready(step(params))
        seconds.append(time.perf_counter() - begin)
    return {"seconds": min(seconds[1:]), "bytes": memory.temp_size_in_bytes}


def _mesh() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))


def _opened(given: dict[str, Any]):
    source, mesh = open_model(given["model"]), _mesh()
    params = source.load_params(mesh, given["dtype"])
    return source.config, load_tokenizer(given["model"], source.config.vocab_size), params, mesh


_ROWS = {f.__name__: f for f in (train, generate, generate_ends, score, load, growth)}

if __name__ == "__main__":
    row, given = sys.argv[1], json.loads(sys.argv[2])
    Path(given["output"]).parent.mkdir(parents=True, exist_ok=True)
    try:
        print(dumps(_ROWS[row](given)))
    except UserError as error:
        sys.exit(f"error: {error}")
