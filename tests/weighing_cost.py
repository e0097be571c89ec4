"""What the weighing pass costs beside one packed forward pass, and beside six padded passes.

    python -m tests.weighing_cost OUTPUT_DIR [--pairs N] [--tiny]

On the 100 real pairs and the model of `tests.real_input` (or, with --tiny, on a few made-up pairs and a random model of
two layers, to see that it works). The perturbed prompt is the prompt without its last tenth, as a dropped constraint
makes it shorter.

Baseline: `score`, one packed pass over prompt and response of both sides. Weighing: `contrast` as the command runs it,
for the default rule (two contexts) and for all rules (three). Six passes: (full, perturbed, none) x (chosen, rejected),
one after the other, each batch padded to its longest sequence, whole [tokens, vocabulary] logits, as the authors'
script makes them. Every pass runs once before its time is taken, so no compilation is in it; the best of --repeats is
printed.

FLOPs are counted from tokens: the decoder over all tokens (of the padded passes: padding included), the head over
response tokens (of the padded passes: all).
"""

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.checkpoints.runs import open_model
from lm_jax.config import BatchConfig, ComputeConfig, MeshConfig
from lm_jax.data.packing import Segment, example_lengths
from lm_jax.data.plans import plan_passes
from lm_jax.data.text import TextEncoder
from lm_jax.data.tokenizers import load_tokenizer
from lm_jax.models.decoder import Decoder, output_embedding
from lm_jax.scoring.contexts import contrast
from lm_jax.scoring.scoring import score
from lm_jax.sharding import make_mesh
from lm_jax.training.flops import forward_flops
from musc_jax.training.examples import load_pairs
from musc_jax.weights.command import no_prompt, response_scores
from musc_jax.weights.rules import CONTEXTS, DEFAULT_RULE, WEIGHING_RULES, contexts_of
from tests.checkpoints import make_checkpoint, make_tokenizer
from tests.e2e.common import make_pairs

ROOT = Path(__file__).resolve().parents[1]
PAIRS = ROOT.parent / "shared" / "data" / "musc_tdpo_demo.json"
PADDED_ROWS = 8  # sequences of a padded batch
PAD_TO = 64  # so that few shapes compile


def head_flops(config, tokens: int) -> float:
    return 2.0 * config.d_model * config.vocab_size * tokens


def packed_flops(config, examples) -> float:
    """Decoder over all tokens, head over response tokens."""
    segments = [segment for example in examples for segment in example]
    body = forward_flops(dataclasses.replace(config, vocab_size=0), np.array([len(s) for s in segments]))
    return body + head_flops(config, sum(len(s.response) for s in segments))


def padded_batches(segments) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and segment ids [rows, longest], in the data's order."""
    batches = []
    for start in range(0, len(segments), PADDED_ROWS):
        part = segments[start : start + PADDED_ROWS]
        longest = -(-max(map(len, part)) // PAD_TO) * PAD_TO
        tokens, present = (np.zeros((PADDED_ROWS, longest), np.int32) for _ in range(2))
        for row, segment in enumerate(part):
            tokens[row, : len(segment)] = np.concatenate([segment.prompt, segment.response])
            present[row, : len(segment)] = 1
        batches.append((tokens, present))
    return batches


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def whole_logits(params, tokens, present, config, compute):
    """Entropies and log-probs [B, T] by way of [B, T, V], as a script with model(**batch).logits has it."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = Decoder(config, compute).apply({"params": params}, tokens, positions, present)
    logp = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, output_embedding(params, config)).astype(jnp.float32))
    own = jnp.take_along_axis(logp[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    return own, -jnp.sum(jnp.exp(logp) * logp, -1)


def best_of(repeats: int, run: Callable[[], None]) -> float:
    run()  # compiles
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def measure(model: Path, pairs_file: Path, number: int | None, max_length: int, repeats: int) -> dict:
    source = open_model(str(model))
    config = source.config
    tokenizer = load_tokenizer(source.directory, config.vocab_size)
    encoder = TextEncoder(tokenizer, max_length)
    pairs = load_pairs(str(pairs_file), encoder, "uniform")
    full = pairs.segments[: 2 * number if number else None]
    nothing = {form: no_prompt(encoder, tokenizer, form) for form in {type(row.prompt) for row in pairs.rows}}

    def under(context, i):
        segment = full[i]
        prompts = {
            "full": segment.prompt,
            "perturbed": segment.prompt[: max(1, len(segment.prompt) * 9 // 10)],
            "none": nothing[type(pairs.rows[i // 2].prompt)],
        }
        return Segment(prompts[context], segment.response)

    compute = ComputeConfig("float32")
    mesh = make_mesh(MeshConfig(1, -1, 1))
    params = source.load_params(mesh, "float32")
    batch = BatchConfig(2 * jax.device_count(), 4 * max_length)  # of all packed passes

    def slots(examples):
        return len(plan_passes(example_lengths(examples), batch, 1)) * batch.rows * batch.row_length

    def forward():
        for _ in score(params, full, config, compute, batch, mesh):
            pass

    def weigh(rules):
        contexts = contexts_of(rules)
        examples = [tuple(under(c, i) for c in contexts) for i in range(len(full))]
        divergences = any(WEIGHING_RULES[rule].divergences for rule in rules)
        wanted = np.ones(len(full), bool)

        def run():
            for part in contrast(params, examples, wanted, config, compute, batch, mesh, divergences):
                for item, found in part:
                    scores = response_scores(found, contexts, ("chosen", "rejected")[item % 2], (0, str(item)))
                    for rule in rules:
                        WEIGHING_RULES[rule].weigh(scores)

        return run, examples

    padded = [padded_batches([under(c, i) for i in range(side, len(full), 2)]) for c in CONTEXTS for side in (0, 1)]

    def six():
        for batches in padded:
            for tokens, present in batches:
                jax.block_until_ready(whole_logits(params, tokens, present, config, compute))

    entries = {
        "forward": (forward, [(segment,) for segment in full]),
        "default": weigh((DEFAULT_RULE,)),
        "all": weigh(tuple(WEIGHING_RULES)),
    }
    report = {
        name: {
            "tokens": int(example_lengths(examples).sum()),
            "slots": slots(examples),
            "flops": packed_flops(config, examples),
        }
        for name, (_, examples) in entries.items()
    }
    widths = np.array([tokens.shape[1] for batches in padded for tokens, _ in batches for _ in range(PADDED_ROWS)])
    tokens = int(sum(present.sum() for batches in padded for _, present in batches))
    report["six_padded"] = {"tokens": tokens, "slots": int(widths.sum()), "flops": forward_flops(config, widths)}
    for name, run in (*((n, e[0]) for n, e in entries.items()), ("six_padded", six)):
        report[name]["seconds"] = best_of(repeats, run)
    report["ratios_to_forward"] = {
        name: {key: report[name][key] / report["forward"][key] for key in ("tokens", "slots", "flops", "seconds")}
        for name in ("default", "all", "six_padded")
    }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--pairs", type=int, default=None, help="the first N of the file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    model = arguments.output / "model"
    if arguments.tiny:
        make_checkpoint(model, "llama")
        make_tokenizer(model)
        pairs, max_length = Path(make_pairs(arguments.output / "pairs.jsonl", 12)), 64
    else:
        pairs, max_length = PAIRS, 1024
        if not model.exists():
            command = [sys.executable, "-m", "tests.real_input", str(model)]
            subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    print(json.dumps(measure(model, pairs, arguments.pairs, max_length, arguments.repeats), indent=1))


if __name__ == "__main__":
    main()
