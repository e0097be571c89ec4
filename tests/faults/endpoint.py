"""A server that fails in three of ten requests, while pairs are made with it."""

import json
import threading

from tests.e2e import common
from tests.e2e.common import Fork, arguments
from tests.e2e.test_musc_rounds import THINGS
from tests.faults.bench import Bench
from tests.http_server import Asked, Reply, Server
from tests.strong_model import script

REQUESTS = 200
SHARE = 0.3


def faulty_endpoint(bench: Bench, number: int) -> str:
    """Every instruction ends as a pair or as a counted drop, and those that were answered as without faults."""
    directory = bench.directory / f"endpoint_{number}"
    directory.mkdir()
    tasks = [{"prompt": f"Write on {thing}. Use {i} lines. Name a tool. Rhyme."} for i in range(4) for thing in THINGS]
    rows = common.write_rows(directory / "tasks.jsonl", tasks)
    whole = _pairs(rows, f"{directory}/whole.jsonl", Server(script()))[0]
    rng, lock, failed = bench.rng, threading.Lock(), []
    faults = (
        *(Reply(b"z" * 500, cut="half"), Reply(cut="all"), Reply({}, 500), Reply({}, 503, {"retry-after-ms": "5"})),
        *(
            Reply({}, 429, {"retry-after-ms": "5"}),
            Reply(b"{"),
            Reply({"choices": []}),
            Reply({}, 400),
            Reply({}, after=9),
        ),
    )
    answered = script()

    def reply(asked: Asked) -> Reply:
        with lock:
            fault = rng.choice(faults) if rng.random() < SHARE else None
            failed.append(fault is not None)
        return fault or answered(asked)

    made, counts = _pairs(rows, f"{directory}/made.jsonl", Server(reply))
    assert len(failed) >= REQUESTS, len(failed)
    by_id = {row["id"]: row for row in whole}
    wrong = [row["id"] for row in made if row["id"] in by_id and row["prompt"] != by_id[row["id"]]["prompt"]]
    assert not wrong, wrong
    dropped = counts["dropped"]
    assert counts["pairs"] == len(made) and len(made) + dropped == len(tasks), counts
    return f"{sum(failed)} of {len(failed)} requests failed: {len(made)} pairs, {dropped} dropped, of {len(tasks)}"


def _pairs(rows: str, output: str, server: Server) -> tuple[list[dict], dict]:
    with server:
        settings = (
            "max_failed_share=0.5",
            "near_duplicate=0.0",
            "endpoint.concurrency=8",
            "endpoint.timeout=1.0",
        )
        given = (f"input={rows}", f"output={output}", f"endpoint.url={server.url}", "endpoint.model=scripted")
        Fork("musc_pairs", *arguments("musc_pairs", *given, *settings)).wait().ok()
    with open(f"{output}.counts.json") as file:
        return common.read_rows(output), json.load(file)
