"""A training that keeps a copy in a bucket goes on on another machine, bit for bit, from whatever was copied whole."""

import shutil
import signal
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from lm_jax.checkpoints.mirror import whole_steps
from lm_jax.checkpoints.orbax import Checkpoints
from tests import object_store
from tests.e2e import common
from tests.e2e.common import SMALL_SCORE, SMALL_TRAIN, TIMING, Done, Fork, arguments

pytest.importorskip("s3fs", reason="pip install -e '.[remote]'")
pytest.importorskip("moto", reason="moto[s3] and flask are the S3 server of the tests")

STEPS = 24
SETTINGS = ("epochs=100", f"max_steps={STEPS}", "checkpoints.every=8", "eval_every=8", "seed=7")


@pytest.fixture(scope="module")
def server():
    with object_store.serve() as store:
        yield store


class Machines:
    """The same training in directories of machines that share a bucket and nothing else."""

    def __init__(self, directory: Path, server: object_store.Store):
        self.directory, self.server = directory, server
        self.model = common.make_model(directory / "model")
        self.pairs = common.make_pairs(directory / "pairs.jsonl")
        self.bucket = server.make_bucket("runs")

    def start(self, machine: str, remote: str | None, *settings: str) -> Fork:
        where = (f"model={self.model}", f"input={self.pairs}", f"output={self.directory / machine / 'run'}")
        copy = () if remote is None else (f"checkpoints.remote={self.bucket}/{remote}",)
        flags = arguments("musc_train", *where, *copy, *SMALL_TRAIN, *SETTINGS, *settings, preset="tiny")
        return Fork("musc_train", *flags, settings=self.server.settings)

    def run(self, machine: str, remote: str | None, *settings: str) -> Done:
        return self.start(machine, remote, *settings).wait()

    def kill_at(self, machine: str, remote: str, method: str, ending: str) -> None:
        """Kills it with a request under way, which never comes to its end."""
        reached, killed = threading.Event(), threading.Event()

        def refuses(asked, path):
            if asked == method and path.endswith(ending):
                reached.set()
                killed.wait(60)
                return True
            return False

        with self.server.refusing(refuses):
            run = self.start(machine, remote)
            assert reached.wait(120), run.wait().stderr[-2000:]
            run.process.kill()
            killed.set()
            assert run.wait().status == -signal.SIGKILL


@pytest.fixture(scope="module")
def machines(tmp_path_factory, server):
    return Machines(tmp_path_factory.mktemp("machines"), server)


@pytest.fixture(scope="module")
def undisturbed(machines):
    machines.run("undisturbed", None).ok()
    return state(machines.directory / "undisturbed/run")


def state(run: Path) -> tuple[dict, list[dict]]:
    """Everything of the last checkpoint, and the metrics."""
    with Checkpoints(f"{run}/checkpoints", keep=None) as checkpoints:
        items = checkpoints.restore({"params": None, "optimizer": None, "progress": None}, STEPS)
    records = [{k: v for k, v in row.items() if k not in TIMING} for row in common.read_rows(run / "metrics.jsonl")]
    return items, records


def assert_same(ours, theirs):
    assert ours[1] == theirs[1]
    leaves = zip(jax.tree.leaves_with_path(ours[0]), jax.tree.leaves(theirs[0]), strict=True)
    assert [] == [path for (path, a), b in leaves if not np.array_equal(np.asarray(a), np.asarray(b))]


@pytest.mark.slow
def test_a_fresh_machine_goes_on_bit_for_bit(machines, undisturbed):
    """The first one ends while it copies its second checkpoint: that one does not count."""
    machines.kill_at("first", "a", "PUT", "/a/checkpoints/16/part.0-of-1.json")
    remote = f"{machines.bucket}/a"
    assert list(whole_steps(remote)) == [8]
    assert any(name.startswith("checkpoints/16/") for name in machines.server.names(remote))
    done = machines.run("second", "a").ok()
    assert "after step 8" in done.stdout + done.stderr
    assert_same(state(machines.directory / "second/run"), undisturbed)
    assert list(whole_steps(remote)) == [16, STEPS]  # checkpoints.keep=2
    # The first machine comes back, with a checkpoint of its own that is older than the copy's
    done = machines.run("first", "a").ok()
    assert f"after step {STEPS}" in done.stdout + done.stderr
    assert_same(state(machines.directory / "first/run"), undisturbed)
    # One that was there all the time and lost everything has the run from the copy alone
    shutil.rmtree(machines.directory / "first")
    machines.run("first", "a").ok()
    assert_same(state(machines.directory / "first/run"), undisturbed)


@pytest.mark.slow
def test_a_checkpoint_that_was_not_copied_is_copied_by_the_next_start(machines, undisturbed):
    with machines.server.refusing(lambda method, path: method == "PUT" and "/b/checkpoints/24/" in path):
        line = machines.run("third", "b").error()
    assert "step 24: not copied, though whole" in line and "no access" in line
    assert object_store.SECRET not in line
    assert max(whole_steps(f"{machines.bucket}/b")) == 16
    machines.run("third", "b").ok()
    assert max(whole_steps(f"{machines.bucket}/b")) == STEPS
    shutil.rmtree(machines.directory / "third")
    machines.run("third", "b").ok()
    assert_same(state(machines.directory / "third/run"), undisturbed)


@pytest.mark.slow
def test_a_copy_belongs_to_one_run(machines, undisturbed):
    machines.run("fourth", "c", "max_steps=8").ok()
    line = machines.run("fifth", "c", "max_steps=8", "optim.learning_rate=0.5").error()
    assert "s3://runs/c/config.json" in line and "learning_rate" in line
    assert not (machines.directory / "fifth/run/config.json").exists()
    line = machines.run("fourth", "d", "max_steps=8").error()
    assert "config.checkpoints.remote" in line
    line = machines.run("sixth", None, "checkpoints.remote=s3://no-such-bucket/run").error()
    assert "no bucket s3://no-such-bucket" in line
    # Damaged on the way or there: the older one is taken
    system = machines.server.system()
    (arrays,) = [n for n in machines.server.names("s3://runs/c/checkpoints/8") if n.startswith("params/d/")][:1]
    whole = system.cat_file(f"s3://runs/c/checkpoints/8/{arrays}")
    system.pipe_file(f"s3://runs/c/checkpoints/8/{arrays}", whole[:-1] + bytes([whole[-1] ^ 1]))
    line = machines.run("seventh", "c", "max_steps=8").error()
    assert "arrives undamaged" in line


@pytest.mark.slow
def test_commands_read_and_write_buckets(machines, server, tmp_path):
    """Weighing, training on the weights, exporting and scoring, each beside the same on a local disk."""
    bucket = server.make_bucket("commands")
    rows = common.read_rows(machines.pairs)
    pairs = common.write_rows(tmp_path / "pairs.jsonl", [{**r, "perturbed_prompt": r["prompt"][:-3]} for r in rows])
    asked = common.write_rows(
        tmp_path / "asked.jsonl", [{"prompt": r["prompt"], "response": r["chosen"]} for r in rows]
    )
    system = server.system()
    system.put(pairs, f"{bucket}/pairs.jsonl"), system.put(asked, f"{bucket}/asked.jsonl")
    system.put(machines.model, f"{bucket}/model", recursive=True)
    settings = {**server.settings, "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def everything(root: str, model: str, run: str, remote: tuple[str, ...]) -> list[str]:
        def command(name, *flags, preset=""):
            done = common.fork(name, *arguments(name, *flags, preset=preset), settings=settings).ok()
            assert "Traceback" not in done.stderr
            return done.stderr

        said = [
            command(
                "score", f"model={model}", f"input={root}/asked.jsonl", f"output={root}/out/scored.jsonl", *SMALL_SCORE
            )
        ]
        weighed = f"{root}/out/weighed.jsonl"
        said += [
            command(
                "musc_token_weights", f"model={model}", f"input={root}/pairs.jsonl", f"output={weighed}", *SMALL_SCORE
            )
        ]
        given = (f"model={model}", f"input={weighed}", f"output={run}", "weights=store", "max_steps=2", *remote)
        said += [command("musc_train", *given, *SMALL_TRAIN, preset="tiny")]
        trained = remote[0].partition("=")[2] if remote else run
        said += [command("export_hf", f"model={trained}", f"output={root}/out/exported", "dtype=float32")]
        return said

    copy = (f"checkpoints.remote={bucket}/run",)
    said = everything(bucket, f"{bucket}/model", str(tmp_path / "run"), copy)
    everything(str(tmp_path), machines.model, str(tmp_path / "local_run"), ())
    system.get(f"{bucket}/out", str(tmp_path / "fetched"), recursive=True)
    for name in ("scored.jsonl", "exported/model.safetensors", "exported/config.json", "exported/tokenizer.json"):
        assert (tmp_path / "fetched" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
    here, there = (common.read_rows(tmp_path / at / "weighed.jsonl") for at in ("out", "fetched"))
    assert [row["token_weights"]["store"] for row in there] == ["weighed.weights"] * len(rows)
    assert [row["chosen"] for row in here] == [row["chosen"] for row in there]
    assert not [line for text in said for line in text.splitlines() if "errno" in line]  # libraries that complain
    assert server.names(f"{bucket}/out/exported").count("config.json") == 1

    unknown = {**settings, "AWS_ACCESS_KEY_ID": "unknown"}
    flags = arguments("score", f"model={machines.model}", f"input={asked}", f"output={bucket}/x.jsonl", *SMALL_SCORE)
    line = common.fork("score", *flags, settings=unknown).error()
    assert f"{bucket}/x.jsonl" in line and "access" in line and object_store.SECRET not in line
    flags = arguments("musc_train", f"model={machines.model}", f"input={pairs}", f"output={bucket}/run", preset="tiny")
    assert "config.checkpoints.remote" in common.fork("musc_train", *flags, settings=settings).error()
