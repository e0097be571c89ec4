"""Generation and scoring here and in transformers + torch, in turn on the same machine, model and rows.

    python -m tests.inference_beside_transformers OUTPUT_DIR [generation|scoring]

Generation: 256 prompts of 20 to 200 tokens of real text, up to 128 new tokens at temperature 1, and a model that ends
early: a share of the vocabulary counts as end tokens. transformers takes batches as the rows come, and also sorted.
Scoring: log-probs of 1,000 real responses; transformers takes batches sorted by length and also as the rows come, with
the head on all tokens; ours with entropies, as `launch.score` has them, and without, as `launch.main_filter` does its
passes.
Compilation is left out on our side (each measurement is the second of its kind in the process), as is loading on both.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.real_input import DATA

ROOT = Path(__file__).resolve().parents[1]
NEW_TOKENS = 128
# Share of the vocabulary that ends a response: 1/32 and 1/64 a token, and never
ENDS = {"mean 32": 256, "mean 64": 128, "none": 0}


def prompts(tokenizer) -> list[str]:
    """256 pieces of real text."""
    text = " ".join(row["text"] for row in json.loads((DATA / "c4_demo.json").read_text()))
    ids, random = tokenizer(text)["input_ids"], np.random.default_rng(0)
    starts, lengths = random.integers(0, len(ids) - 200, 256), random.integers(20, 201, 256)
    return [tokenizer.decode(ids[s : s + n]) for s, n in zip(starts, lengths, strict=True)]


def responses() -> list[tuple[str, str]]:
    """1,000 real (prompt, response)."""
    rows = json.loads((DATA / "alpaca_en_demo.json").read_text())
    return [(f"{r['instruction']}\n{r['input']}\n", r["output"]) for r in rows]


def end_ids(number: int) -> list[int]:
    """The model's own end token and `number` others."""
    return [2, *range(1000, 1000 + number)]


def their_generation(model: str) -> Iterator[dict[str, Any]]:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model, padding_side="left")
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    texts = prompts(tokenizer)
    by_length = sorted(texts, key=lambda text: len(tokenizer(text)["input_ids"]))
    for ends, number in ENDS.items():
        for order, rows in (("as they come", texts), ("sorted", by_length)):
            for batch in (32, 64):
                begin, new = time.perf_counter(), 0
                for start in range(0, len(rows), batch):
                    inputs = tokenizer(rows[start : start + batch], return_tensors="pt", padding=True)
                    stops, options = end_ids(number), {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
                    with torch.no_grad():
                        out = network.generate(
                            **inputs, max_new_tokens=NEW_TOKENS, eos_token_id=stops, pad_token_id=0, **options
                        )
                    out = out[:, inputs["input_ids"].shape[1] :].numpy()
                    ended = np.isin(out, stops)
                    new += int(np.where(ended.any(1), ended.argmax(1) + 1, out.shape[1]).sum())
                seconds = time.perf_counter() - begin
                yield {"ends": ends, "order": order, "batch": batch, "tokens": new, "seconds": seconds}


def our_model(model: str):
    from lm_jax.config import MeshConfig
    from lm_jax.data.tokenizers import load_tokenizer
    from lm_jax.sharding import make_mesh
    from lm_jax.training.runs import open_model

    source, mesh = open_model(model), make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
    return source.config, load_tokenizer(model), source.load_params(mesh, "float32"), mesh


def our_generation(model: str) -> Iterator[dict[str, Any]]:
    from lm_jax.config import ComputeConfig, DecodeConfig
    from lm_jax.inference.requests import Request, SamplingConfig
    from lm_jax.inference.sampling import LocalGenerator

    config, tokenizer, params, mesh = our_model(model)
    requests = [Request(str(i), text) for i, text in enumerate(prompts(tokenizer))]
    for ends, number in ENDS.items():
        for slots in (48, 64):
            generator = LocalGenerator(
                params, config, tokenizer, tuple(end_ids(number)), ComputeConfig("float32"),
                DecodeConfig(slots=slots, max_length=512, chunk=8), mesh,
            )  # fmt: skip
            for _ in range(2):
                begin = time.perf_counter()
                done = [c for group in generator.generate(requests, SamplingConfig(NEW_TOKENS)) for c in group]
                seconds = time.perf_counter() - begin
            tokens = sum(sample.num_tokens for c in done for sample in c.samples)
            yield {"ends": ends, "slots": slots, "tokens": tokens, "seconds": seconds}


def their_scoring(model: str) -> Iterator[dict[str, Any]]:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    rows = [(tokenizer(p)["input_ids"], tokenizer(r)["input_ids"] + [tokenizer.eos_token_id]) for p, r in responses()]
    by_length = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    tokens = sum(len(p) + len(r) for p, r in rows)
    for (order, ordered), batch in itertools.product((("sorted", by_length), ("as they come", rows)), (8, 16, 32)):
        begin, total = time.perf_counter(), 0.0
        for start in range(0, len(rows), batch):
            part = ordered[start : start + batch]
            width = max(len(p) + len(r) for p, r in part)
            ids, wanted = np.zeros((len(part), width), np.int64), np.zeros((len(part), width), bool)
            for b, (p, r) in enumerate(part):
                ids[b, : len(p) + len(r)] = p + r
                wanted[b, len(p) : len(p) + len(r)] = True
            with torch.no_grad():
                logprobs = torch.log_softmax(network(torch.from_numpy(ids)).logits[:, :-1].float(), -1)
                chosen = logprobs.gather(-1, torch.from_numpy(ids)[:, 1:, None])[..., 0]
            total += float(chosen[torch.from_numpy(wanted)[:, 1:]].sum())
        seconds = time.perf_counter() - begin
        yield {"order": order, "batch": batch, "tokens": tokens, "seconds": seconds, "sum": total}


def our_scoring(model: str) -> Iterator[dict[str, Any]]:
    from lm_jax.config import BatchConfig, ComputeConfig
    from lm_jax.data.packing import Segment
    from lm_jax.inference.scoring import score

    config, tokenizer, params, mesh = our_model(model)
    segments = [
        Segment(*(np.array(x, np.int32) for x in (tokenizer(p)["input_ids"], [*tokenizer(r)["input_ids"], 2])))
        for p, r in responses()
    ]
    shapes = ((4, 1024), (4, 2048), (8, 1024))
    compute = ComputeConfig("float32", logprob_chunk=64)  # what a CPU's caches hold; accelerators want more
    for entropies, (rows, row_length) in itertools.product((True, False), shapes):
        batch = BatchConfig(rows=rows, row_length=row_length, microbatches=1, max_examples_per_row=64)
        for _ in range(2):
            begin, total = time.perf_counter(), 0.0
            for group in score(params, segments, config, compute, batch, mesh, entropies):
                total += sum(float(s.logprobs.sum()) for s in group)
            seconds = time.perf_counter() - begin
        yield {
            "entropies": entropies,
            "rows": rows,
            "row_length": row_length,
            "tokens": sum(map(len, segments)),
            "seconds": seconds,
            "sum": total,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("what", nargs="?", choices=("generation", "scoring"))
    parser.add_argument("--child")
    arguments = parser.parse_args()
    model = arguments.output / "model"
    if arguments.child:
        for row in globals()[arguments.child](str(model)):
            print(json.dumps(row | {"tokens_per_second": round(row["tokens"] / row["seconds"])}), flush=True)
        return
    if not model.exists():
        subprocess.run([sys.executable, "-m", "tests.real_input", str(model)], cwd=ROOT, check=True, stdout=sys.stderr)
    # One JAX device a core: rows are independent, and small operations run on one core each
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    for what in [arguments.what] if arguments.what else ["generation", "scoring"]:
        for who in (f"their_{what}", f"our_{what}"):
            command = [
                sys.executable,
                "-m",
                "tests.inference_beside_transformers",
                str(arguments.output),
                "--child",
                who,
            ]
            done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            for line in done.stdout.splitlines():
                print(who, line, flush=True)


if __name__ == "__main__":
    main()
