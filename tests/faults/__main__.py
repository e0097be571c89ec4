"""Breaks real runs in every way that is promised to be survived, and counts: `python -m tests.faults --times=3`.

Each fault has a name; --only=NAME,NAME runs some. Moments and victims are drawn from a try's own seed, of which each
fault has as many as the table below says, from --seed on; --times says how many else. A line for each try, a table at
the end, exit status 1 where something did not hold. What stands in --output already is not tried again. As root small
file systems are mounted, to be filled and to be lost.
"""

import argparse
import json
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.e2e import common
from tests.faults import bucket, damage, disk, endpoint, growth, parts, processes
from tests.faults.bench import Bench

TWO = 10  # tries of what involves two processes
FAULTS = {
    "kill_training": (processes.kill_training, TWO),
    "kill_command": (processes.kill_command, TWO),
    "kill_rounds": (processes.kill_rounds, TWO),
    "stop_training": (processes.stop_training, TWO),
    "missing_process": (processes.missing_process, TWO),
    "part": (parts.part, len(parts.TRIES)),
    "full_in_training": (disk.full_in_training, TWO),
    "full_in_rows": (disk.full_in_rows, TWO),
    "full_in_export": (disk.full_in_export, TWO),
    "lost_in_training": (disk.lost_in_training, TWO),
    "bucket_in_training": (bucket.bucket_in_training, TWO),
    "damaged_checkpoint": (damage.damaged_checkpoint, TWO),
    "damaged_journal": (damage.damaged_journal, TWO),
    "damaged_safetensors": (damage.damaged_safetensors, 3),
    "damaged_store": (damage.damaged_store, 3),
    "damaged_rows": (damage.damaged_rows, 3),
    "faulty_endpoint": (endpoint.faulty_endpoint, 3),
    "growth": (growth.growth, 3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--times", type=int)
    parser.add_argument("--only", default=",".join(FAULTS))
    parser.add_argument("--output", help="JSON lines, one for each try")
    given = parser.parse_args()
    output = given.output and Path(given.output)
    results = common.read_rows(output) if output and output.exists() else []
    there = {(row["fault"], row["seed"]) for row in results}
    names = given.only.split(",")
    tries = [(name, given.seed + i) for name in names for i in range(given.times or FAULTS[name][1])]
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory))
        for name, seed in (t for t in tries if t not in there):
            bench.rng, bench.waited, begin = random.Random(f"{name} {seed}"), None, time.monotonic()
            try:
                what, held = FAULTS[name][0](bench, seed), True
            except Exception as error:
                traceback.print_exc()
                what, held = f"{type(error).__name__}: {str(error)[:500]}", False
            row = {"fault": name, "seed": seed, "held": held, "what": what, "waited": bench.waited}
            results.append(row | {"seconds": round(time.monotonic() - begin)})
            print(json.dumps(results[-1]), flush=True)
            if output:
                with output.open("a") as file:
                    file.write(json.dumps(results[-1]) + "\n")
    for name in dict.fromkeys(row["fault"] for row in results):
        own = [row for row in results if row["fault"] == name]
        waited = [row["waited"] for row in own if row["waited"] is not None]
        longest = f", longest wait {max(waited):.0f} s" if waited else ""
        print(f"{name:<22} {sum(row['held'] for row in own):>3} of {len(own)} held{longest}")
    sys.exit(0 if all(row["held"] for row in results) else 1)


if __name__ == "__main__":
    main()
