"""Does the mutual filter see which instruction a response answers? Real pairs against the same pairs shuffled.

    python -m tests.filter_auroc OUTPUT_DIR {task,alpaca}

`task`: a made-up language in which the response depends on the instruction (below), and a model of 0.7M parameters
fitted on 500 pairs of it. `alpaca`: 400 rows of `alpaca_en_demo.json` to fit the 8M model of `tests.real_input` on,
first as text, then as pairs. Forward and reverse model are fitted, and the pairs scored, by the commands that a user
runs; 500 real and 500 shuffled pairs of other rows are scored. Prints the AUROC of each score with its 95% interval.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import transformers

from main_jax.filter.auroc import auroc
from main_jax.filter.scores import SCORES
from tests import real_input
from tests.checkpoints import make_tokenizer

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
SYSTEM = "Answer."
QUESTION = "{response}\n\nWhat was asked?"
SCORED = 500  # pairs of each kind

KINDS = {
    "birds": "hen owl jay tit emu kea auk daw rook wren",
    "tools": "saw axe awl hoe file rake drill lathe plane clamp",
    "foods": "pie jam ham egg soup rice bean corn leek plum",
    "rooms": "den hall loft attic study cellar lobby porch pantry nook",
    "metals": "tin zinc iron lead gold nickel silver copper brass steel",
    "trees": "oak ash elm fir yew pine palm cedar birch alder",
}
NUMBERS = ("two", "three", "four", "five")
JOINTS = {"with commas": ", ", "with dashes": " - ", "in lines": "\n", "with and": " and "}
ENDS = {"": "", " and say thanks": "\nthanks", " and say bye": "\nbye"}
ASKS = ("name {n} {k}", "list {n} {k}", "give me {n} {k}", "{n} {k} please")


def made_up_pairs(number: int, seed: int) -> list[tuple[str, str]]:
    """(instruction, response): so many words of a kind, joined as asked."""
    rng, pairs = random.Random(seed), []
    for _ in range(number):
        kind, count, joint, end = (rng.choice(list(x)) for x in (KINDS, range(4), JOINTS, ENDS))
        ask = rng.choice(ASKS).format(n=NUMBERS[count], k=kind)
        words = rng.sample(KINDS[kind].split(), count + 2)
        pairs.append((f"{ask} {joint}{end}", JOINTS[joint].join(words) + ENDS[end]))
    return pairs


def alpaca_pairs() -> list[tuple[str, str]]:
    rows = json.loads((DATA / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    pairs = [("\n".join(filter(None, (r["instruction"], r.get("input")))), r["output"]) for r in rows if r["output"]]
    random.Random(0).shuffle(pairs)
    return [pair for pair in pairs if len(pair[0]) + len(pair[1]) < 2000]


def command(name: str, *settings: str) -> None:
    flags = (f"--config=configs/{name}.py:tiny", *(f"--config.{s}" for s in settings))
    run = [sys.executable, "-m", f"launch.{name}", *flags]
    subprocess.run(run, cwd=ROOT, check=True, stdout=sys.stderr, env={**os.environ, "JAX_PLATFORMS": "cpu"})


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def fit(output: Path, model: Path, name: str, rows: list[dict], *settings: str) -> Path:
    data = write(output / f"{name}.jsonl", rows)
    command("main_train", f"model={model}", f"input={data}", f"output={output / name}", *settings)
    return output / name


def chat(question: str, answer: str, system: str = "") -> dict:
    head = [{"role": "system", "content": system}] if system else []
    return {"messages": [*head, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def measure(output: Path, task: str) -> dict:
    began, base = time.monotonic(), output / "model"
    if task == "task":
        pairs, fitted = made_up_pairs(500 + SCORED, 0), 500
        make_tokenizer(base)
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        real_input.make_model(base, tokenizer, hidden_size=128, intermediate_size=352, num_hidden_layers=3)
        settings = ("epochs=24", "max_length=256", "optim.learning_rate=2e-3")
    else:
        pairs, fitted = alpaca_pairs(), 400
        real_input.make_model(base, real_input.make_tokenizer(base))
        texts = [{"prompt": "\n", "response": text} for pair in pairs[:fitted] for text in pair]
        base = fit(output, base, "text", texts, "epochs=3", "optim.learning_rate=1e-3")
        settings = ("epochs=3", "optim.learning_rate=1e-3")
    training, scored = pairs[:fitted], pairs[fitted : fitted + SCORED]
    forward = fit(output, base, "forward", [chat(i, r, SYSTEM) for i, r in training], *settings)
    reverse = fit(output, base, "reverse", [chat(QUESTION.format(response=r), i) for i, r in training], *settings)
    # Each response with its own instruction, and with that of the next row
    rows = [
        {"id": f"{kind}-{n}", "response": response, "instruction": scored[(n + step) % len(scored)][0]}
        for kind, step in (("real", 0), ("shuffled", 1))
        for n, (_, response) in enumerate(scored)
    ]
    candidates, kept = write(output / "candidates.jsonl", rows), output / "kept.jsonl"
    words = (f"prompts.synthetic_system={SYSTEM}", f"prompts.reverse_question={QUESTION}")
    where = (f"forward={forward}", f"reverse={reverse}", f"input={candidates}", f"output={kept}")
    command("main_filter", *where, *words, "fraction=1.0", "max_length=768")
    found: dict[str, dict[str, list[float]]] = {name: {"real": [], "shuffled": []} for name in SCORES}
    with Path(f"{kept}.candidates.jsonl").open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if row["scores"] is not None:
                for name in SCORES:
                    found[name][row["id"].split("-")[0]].append(row["scores"][name])
    report = {
        name: [round(x, 3) for x in auroc(np.array(kinds["real"]), np.array(kinds["shuffled"]))]
        for name, kinds in found.items()
    }
    counts = {kind: len(values) for kind, values in found["mutual"].items()}
    return {"task": task, "auroc": report, "pairs": counts, "seconds": round(time.monotonic() - began)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("task", choices=("task", "alpaca"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    print(json.dumps(measure(arguments.output, arguments.task), indent=1))


if __name__ == "__main__":
    main()
