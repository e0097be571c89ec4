"""Breaks real runs in every way that is promised to be survived, and counts: `python -m tests.faults --times=3`.

Each fault has a name; --only=NAME,NAME runs some. A line for each try, a table at the end, exit status 1 where
something did not hold. Moments and victims are drawn from the seed. As root a small tmpfs is mounted to be filled.
"""

import argparse
import json
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from tests.e2e import common
from tests.faults import damage, disk, endpoint, growth, processes
from tests.faults.bench import Bench

FAULTS = {
    "kill_training": processes.kill_training,
    "kill_command": processes.kill_command,
    "kill_rounds": processes.kill_rounds,
    "stop_training": processes.stop_training,
    "missing_process": processes.missing_process,
    "damaged_checkpoint": damage.damaged_checkpoint,
    "damaged_safetensors": damage.damaged_safetensors,
    "damaged_store": damage.damaged_store,
    "damaged_journal": damage.damaged_journal,
    "damaged_rows": damage.damaged_rows,
    "full_in_training": disk.full_in_training,
    "full_in_rows": disk.full_in_rows,
    "full_in_export": disk.full_in_export,
    "faulty_endpoint": endpoint.faulty_endpoint,
    "growth": growth.growth,
}


def tries(names: list[str], times: int) -> Iterator[tuple[str, int]]:
    return ((name, number) for name in names for number in range(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--only", default=",".join(FAULTS))
    parser.add_argument("--output", help="JSON lines, one for each try")
    given = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory), random.Random(given.seed))
        for name, number in tries(given.only.split(","), given.times):
            begin = time.monotonic()
            try:
                what, held = FAULTS[name](bench, number), True
            except Exception as error:
                traceback.print_exc()
                what, held = f"{type(error).__name__}: {str(error)[:500]}", False
            row = {"fault": name, "try": number, "held": held, "what": what, "seconds": round(time.monotonic() - begin)}
            results.append(row)
            print(json.dumps(row), flush=True)
    for name in dict.fromkeys(row["fault"] for row in results):
        own = [row for row in results if row["fault"] == name]
        print(f"{name:<22} {sum(row['held'] for row in own):>3} of {len(own)} held")
    if given.output:
        common.write_rows(Path(given.output), results)
    sys.exit(0 if all(row["held"] for row in results) else 1)


if __name__ == "__main__":
    main()
