"""Eight devices compute what one does, hold only their share, and a checkpoint moves between meshes.

No mesh here divides the vocabulary: rows of padding come and go, and count for nothing whatever they hold.
"""

import json
import sys

import pytest

pytestmark = pytest.mark.multi_device

# (data, fsdp, tensor): rows of a microbatch. A step of 11 pairs takes several of them or one, of which 8x1x1 leaves
# rows empty; one device works on all pairs at a time.
MESHES = {(1, 1, 8): 1, (2, 2, 2): 4, (8, 1, 1): 16, (1, 8, 1): 8}
ONE = (1, 1, 1)
RTOL = 1e-5
VOCABULARY = 61


VOCABULARIES = ("embed/embedding", "lm_head/kernel")


def name_of(sizes):
    return "x".join(map(str, sizes))


def computed(directory):
    """Runs in a process with 8 devices: everything on one device and on every mesh. Returns what the tests look at."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from lm_jax.checkpoints.orbax import Checkpoints, abstract_like
    from lm_jax.checkpoints.runs import abstract_params, param_specs
    from lm_jax.config import BatchConfig, ComputeConfig, MeshConfig, ModelConfig, OptimConfig, RopeConfig
    from lm_jax.data.batches import BatchIterator
    from lm_jax.data.packing import Segment, example_lengths
    from lm_jax.data.plans import plan_steps
    from lm_jax.models.decoder import Decoder
    from lm_jax.models.weights import flatten
    from lm_jax.scoring.scoring import score
    from lm_jax.sharding import make_mesh, state_shardings
    from lm_jax.training.checkpointing import checkpoint_items, resume
    from lm_jax.training.optim import make_optimizer, make_schedule
    from lm_jax.training.step import TrainState, make_train_step
    from musc_jax.training.losses import LossConfig
    from musc_jax.training.objective import preference_objective

    # 4 key/value heads: a tensor axis of 8 does not divide them. Two windows: both ways through attention.
    model = ModelConfig(
        "qwen2", VOCABULARY, 2, 32, 48, 8, 4, 4, RopeConfig(1e4), 1e-5, 64, qkv_bias=True, layer_windows=(None, 7)
    )
    compute = ComputeConfig("float32", logprob_chunk=16)
    batch = BatchConfig(rows=8, row_length=32)
    # A large epsilon: AdamW would make as much of a gradient that is nothing but rounding as of any other.
    optim = OptimConfig(1e-2, "constant", 0.0, 0.0, 0.9, 0.99, eps=1e-3, weight_decay=0.1, clip_norm=0.5)
    schedule = make_schedule(optim, 1)
    optimizer = make_optimizer(optim, schedule)
    objective = preference_objective(model, compute, LossConfig("sigmoid", 0.5, 0.0, 0.0, nll_weight=0.2))

    rng = np.random.default_rng(0)

    def segment(prompt):
        size = int(rng.integers(1, 10))
        values = {"weights": rng.uniform(0, 2, size), "ref_logprobs": rng.normal(-4, 1, size)}
        return Segment(prompt, rng.integers(0, VOCABULARY, size), values)

    pairs = [(segment(prompt), segment(prompt)) for prompt in rng.integers(0, VOCABULARY, (11, 2))]
    ids = jnp.ones((1, 4), jnp.int32)
    params = jax.jit(Decoder(model, compute).init)(jax.random.key(0), ids, ids, ids)["params"]
    params = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.2 * rng.standard_normal(x.shape)), params)

    skipped = {}

    def on_mesh(sizes, rows):
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        shapes = abstract_params(model, mesh, "float32")
        padded = jax.tree.map(lambda x, s: np.resize(x, s.shape) if x.shape != s.shape else x, params, shapes)
        abstract = jax.eval_shape(lambda p: TrainState.create(p, optimizer), padded)
        shardings = state_shardings(abstract, param_specs(model, mesh), mesh)
        with jax.set_mesh(mesh):
            placed = jax.device_put(padded, shardings.params)
            segments = [s for pair in pairs for s in pair]
            scores = sorted(s for part in score(placed, segments, model, compute, batch, mesh) for s in part)
            state = jax.jit(lambda p: TrainState.create(p, optimizer), out_shardings=shardings)(placed)
            plan = plan_steps(example_lengths(pairs), len(pairs), 1, seed=0, rows=rows, row_length=32)
            assert len(plan) == 1 and len(scores) == len(segments)
            (shape,) = plan.shapes
            assert (sum(stack.microbatches for stack in shape) > 1) == (rows < 8)
            stacks = next(BatchIterator(plan, pairs, mesh, ("weights", "ref_logprobs")))
            step = jax.jit(
                make_train_step(objective, optimizer, schedule), donate_argnums=0, out_shardings=(shardings, None)
            )
            state, metrics = step(state, stacks)
            # One row, on one part of the mesh, that is not finite: nowhere does anything change
            kept = jax.device_get(jax.tree.map(jnp.copy, (state.params, state.opt_state)))
            arrays, *others = stacks
            ids = arrays["example_ids"][..., :1]
            spoiled = {**arrays, "weights": jnp.where(ids == ids[0, 0, 0], 3e38, arrays["weights"])}
            state, told = step(state, (spoiled, *others))
            now = jax.device_get(jax.tree.map(jnp.copy, (state.params, state.opt_state)))
            skipped[name_of(sizes)] = {
                "loss": str(told["loss"]),
                "count": int(state.skipped),
                "same": all(map(np.array_equal, jax.tree.leaves(kept), jax.tree.leaves(now))),
            }
        return abstract_like(abstract, shardings), state, {k: float(v) for k, v in metrics.items()}, scores

    def cuts(tree):
        """{path: into how many parts its array is cut}, from what a device holds."""
        return {p: x.size // x.addressable_shards[0].data.size for p, x in flatten(tree).items()}

    def true_rows(tree):
        return {p: x[:VOCABULARY] if p in VOCABULARIES else x for p, x in flatten(jax.device_get(tree)).items()}

    def errors(got, expected):
        """The largest difference as a share of the largest entry of all arrays: what cancels is no measure."""
        got, expected = true_rows(got), true_rows(expected)
        largest = max(np.abs(x).max() for x in expected.values())
        return {p: float(np.abs(got[p] - x).max() / largest) for p, x in expected.items()}

    def moment(state, name):
        return optax.tree_utils.tree_get(state.opt_state, name)

    _, expected, expected_metrics, expected_scores = on_mesh(ONE, 11)
    found = {}
    for sizes, rows in MESHES.items():
        abstract, state, metrics, scores = on_mesh(sizes, rows)
        found[name_of(sizes)] = {
            "scores": max(
                float(np.abs(getattr(a, f) - getattr(b, f)).max())
                for a, b in zip(scores, expected_scores, strict=True)
                for f in ("logprobs", "entropies")
            ),
            "metrics": {
                k: abs(v - expected_metrics[k]) / max(abs(expected_metrics[k]), 1e-3) for k, v in metrics.items()
            },
            "gradients": errors(moment(state, "mu"), moment(expected, "mu")),
            "params": errors(state.params, expected.params),
            "moved": errors(state.params, params),
            "rows": len(state.params["embed"]["embedding"]),
            "of_padding": max(float(np.abs(flatten(moment(state, "mu"))[p][VOCABULARY:]).sum()) for p in VOCABULARIES),
            "cuts": {"params": cuts(state.params), **{m: cuts(moment(state, m)) for m in ("mu", "nu")}},
        }
        if sizes == (2, 2, 2):
            with Checkpoints(directory, keep=1) as checkpoints:
                checkpoints.save(1, checkpoint_items(state, {"data": {"next": 1}, "skipped_steps": 1}))
            saved = state

    with Checkpoints(directory, keep=1) as checkpoints:
        restored, position = resume(checkpoints, abstract)  # as the last mesh, 1x8x1, lays it out
    leaves = [jax.tree.leaves(tree) for tree in (restored, saved, abstract)]
    found["skipped"] = skipped
    found["restored"] = {
        "position": position,
        "equal": all(
            np.array_equal(a[:n], b[:n]) if (n := min(np.shape(a)[:1] + np.shape(b)[:1], default=0)) else a == b
            for a, b, _ in zip(*leaves, strict=True)
        ),
        "rows": [len(state.params["embed"]["embedding"]) for state in (saved, restored)],
        "laid_out": all(a.sharding == c.sharding for a, _, c in zip(*leaves, strict=True)),
        "moved": any(a.sharding != b.sharding for a, b, _ in zip(*leaves, strict=True)),
    }
    return found


@pytest.fixture(scope="module")
def found(run_python, tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("run") / "c")
    out = run_python("-m", "tests.multi_device.test_meshes", directory, devices=8, timeout=900)
    return json.loads(out.splitlines()[-1])


@pytest.fixture(params=MESHES, ids=name_of)
def sizes(request):
    return request.param


def test_scores_equal_one_device(found, sizes):
    assert found[name_of(sizes)]["scores"] < RTOL


def test_step_equals_one_device(found, sizes):
    here = found[name_of(sizes)]
    assert {"loss", "grad_norm", "rewards/margins", "nll_loss"} <= set(here["metrics"])
    for what in ("metrics", "gradients", "params"):
        assert max(here[what].values()) < RTOL, {k: v for k, v in here[what].items() if v >= RTOL}
    assert min(here["moved"].values()) > 1e-4, "some parameter did not move, so its gradient was not seen"


def test_rows_of_padding_get_no_gradient(found, sizes):
    here, parts = found[name_of(sizes)], sizes[2]
    assert here["rows"] == -(-VOCABULARY // parts) * parts and here["of_padding"] == 0


def test_a_skipped_step_changes_nothing(found, sizes):
    """And what the other tests compare is the state after it."""
    for where in (sizes, ONE):
        assert found["skipped"][name_of(where)] == {"loss": "nan", "count": 1, "same": True}


def test_each_device_holds_its_share(found, sizes):
    """Every matrix is cut along fsdp and tensor, in the optimiser too; key/value heads where they can be."""
    _, fsdp, tensor = sizes
    kv = tensor if 4 % tensor == 0 else 1
    whole = {"layers/attn/q/bias": tensor, "layers/attn/k/bias": kv, "layers/attn/v/bias": kv}
    for what, cuts in found[name_of(sizes)]["cuts"].items():
        assert len(cuts) == 15, what
        for path, parts in cuts.items():
            if path.endswith("scale"):
                expected = fsdp
            elif path in whole:
                expected = whole[path]
            else:
                expected = fsdp * (kv if path.split("/")[2:3] in (["k"], ["v"]) else tensor)
            assert parts == expected, f"{what} {path} is cut into {parts}"


def test_checkpoint_moves_to_another_mesh(found):
    """Saved on 2x2x2, restored on 1x8x1, bit for bit but for the padding."""
    rows = found["restored"].pop("rows")
    assert found["restored"] == {"position": {"next": 1}, "equal": True, "laid_out": True, "moved": True}
    assert rows == [62, 61]


if __name__ == "__main__":
    print(json.dumps(computed(sys.argv[1])))
