"""A bucket that refuses what one process copies there, or does not answer it."""

import shutil
import threading

from tests import object_store
from tests.faults.bench import Bench
from tests.multi_process.common import assert_same

_SAID = {"refuses": "not copied, though whole", "is silent": "(--process_timeout)"}


def bucket_in_training(bench: Bench, seed: int) -> str:
    """Then another machine goes on from what was copied before."""
    whole, name, rng = bench.undisturbed(), f"bucket_{seed}", bench.rng
    how, victim, step = list(_SAID)[seed % 2], rng.randrange(2), rng.choice((5, 10, 12))
    over = threading.Event()

    def refuses(method: str, path: str) -> bool:
        if method != "PUT" or over.is_set() or f"checkpoints/{step}/" not in path:
            return False
        if ("ocdbt.process_1/" if victim else "/_CHECKPOINT_METADATA") not in path:
            return False
        return how == "refuses" or over.wait(600)

    with object_store.serve() as store:
        given = (f"checkpoints.remote={store.make_bucket(f'runs{seed}')}/{name}",)
        with store.refusing(refuses):
            done = bench.ended(bench.training.start(name, 2, 1, *given, settings=store.settings))
            over.set()
        lines = [d.error(noise=True) for d in done.values()]
        assert all(_SAID[how] in line for line in lines), lines
        shutil.rmtree(bench.training.directory / name)
        bench.training.start(name, 2, 1, *given, settings=store.settings).ok()
        assert_same(bench.training.directory / name, whole)
    return f"{how} process {victim} in step {step}: {lines[0][:120]}"
