"""One epoch of plain DPO on the 100 real pairs, here and in TRL, in turn on the same machine, model and data.

    python -m tests.epoch_beside_trl OUTPUT_DIR [--trl_dtype float32|bfloat16]

Steady state leaves out what happens once: start-up, loading, compilation (our first step and first reference batch, and
TRL's first step, are counted at the mean of the others). Both include one pass of the reference model.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAIRS = ROOT.parent / "shared" / "data" / "musc_tdpo_demo.json"


def ours(model: Path, output: Path) -> dict[str, float]:
    """Seconds of `launch.musc_train` as a user runs it."""
    command = [
        *(sys.executable, "-m", "launch.musc_train", "--config=configs/musc_train.py:tiny"),
        *(f"--config.model={model}", f"--config.input={PAIRS}", f"--config.output={output}"),
        "--config.weights=uniform",
    ]
    # One JAX device a core: rows are independent, and small operations run on one core each.
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.PIPE, text=True, env=environment)
    wall = time.perf_counter() - begin
    responses, seconds, first = re.search(
        r"log-probs of (\d+) responses in ([\d.]+) s \(first batch, with its compilation, ([\d.]+) s", done.stderr
    ).groups()
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    tokens = [b["num_tokens"] - a["num_tokens"] for a, b in zip(steps[:-1], steps[1:], strict=True)]
    step_seconds = [t / s["tokens_per_second"] for t, s in zip(tokens, steps[1:], strict=True)]
    train = sum(step_seconds) * steps[-1]["num_tokens"] / sum(tokens)
    # The reference pass has as many batches as an epoch has steps, to within one.
    reference = (float(seconds) - float(first)) * len(steps) / (len(steps) - 1)
    return {
        "wall": wall,
        "steady": train + reference,
        "train": train,
        "reference": reference,
        "tokens": steps[-1]["num_tokens"],
        "pairs": sum(s["pairs"] for s in steps),
        "loss": [s["loss"] for s in steps],
    }


def trl(model: Path, output: Path, dtype: str) -> dict[str, float]:
    """Seconds of TRL's DPOTrainer."""
    command = [sys.executable, "-m", "tests.trl_oracle", "--model", model, "--data", PAIRS, "--output", output]
    begin = time.perf_counter()
    subprocess.run([*map(str, command), "--dtype", dtype], cwd=ROOT, check=True, capture_output=True)
    result = json.loads(output.read_text())
    steps = result["step_seconds"]
    steady = sum(steps[1:]) * len(steps) / (len(steps) - 1)
    return {
        "wall": time.perf_counter() - begin,
        "steady": steady,
        "loss": [r["loss"] for r in result["log_history"] if "loss" in r],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--trl_dtype", default="float32")
    arguments = parser.parse_args()
    model = arguments.output / "model"
    if not model.exists():
        subprocess.run([sys.executable, "-m", "tests.real_input", str(model)], cwd=ROOT, check=True, stdout=sys.stderr)
    stamp = f"{time.time():.0f}"
    mine = ours(model, arguments.output / f"ours-{stamp}")
    theirs = trl(model, arguments.output / f"trl-{stamp}.json", arguments.trl_dtype)
    ratios = {k: theirs[k] / mine[k] for k in ("steady", "wall")}
    print(json.dumps({"ours": mine, "trl": theirs, "ratio": ratios}, indent=1))


if __name__ == "__main__":
    main()
