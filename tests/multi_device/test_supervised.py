"""Eight devices take the supervised steps that one does, moving averages included."""

import json

import pytest

pytestmark = pytest.mark.multi_device

RTOL = 1e-5


def computed():
    """Runs in a process with 8 devices. Returns the largest differences between a mesh and one device."""
    import jax
    import numpy as np
    import optax

    from lm_jax.checkpoints.runs import param_specs
    from lm_jax.config import ComputeConfig, MeshConfig, ModelConfig, RopeConfig
    from lm_jax.data.batches import BatchIterator
    from lm_jax.data.packing import Segment, example_lengths
    from lm_jax.data.plans import plan_steps
    from lm_jax.models.decoder import Decoder
    from lm_jax.models.weights import flatten
    from lm_jax.sharding import make_mesh, state_shardings
    from lm_jax.training.step import TrainState, make_train_step
    from lm_jax.training.supervised import VALUES, supervised_objective
    from main_jax.training.losses import mixed_coefficients
    from main_jax.training.weighting import AlphaConfig, alpha_state

    model = ModelConfig("llama", 64, 2, 32, 48, 8, 4, 4, RopeConfig(1e4), 1e-5, 64)
    compute = ComputeConfig("float32", attention="reference", logprob_chunk=16)
    kept_state = alpha_state(AlphaConfig("loss_ratio", 0.5, 0.0, 0.5, decay=0.9))
    objective = supervised_objective(model, compute, mixed_coefficients, kept_state)
    optimizer = optax.sgd(0.3)
    rng = np.random.default_rng(0)

    def example(i):
        size = int(rng.integers(3, 12))
        values = {"weights": np.full(size, 0.5 + i % 3), "synthetic": np.full(size, float(i % 4 == 0))}
        return (Segment(rng.integers(0, 64, 3), rng.integers(0, 64, size), values, np.arange(size) % 4 != 2),)

    examples = [example(i) for i in range(30)]
    ids = np.ones((1, 4), np.int32)
    params = jax.jit(Decoder(model, compute).init)(jax.random.key(0), ids, ids, ids)["params"]
    params = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.2 * rng.standard_normal(x.shape)), params)

    def on_mesh(sizes):
        """(state, metrics) after each step."""
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        begin = lambda p: TrainState.create(p, optimizer, jax.tree.map(np.float32, kept_state.initial))  # noqa: E731
        shardings = state_shardings(jax.eval_shape(begin, params), param_specs(model, mesh), mesh)
        rows = 4 if sizes != (1, 1, 1) else 1  # the same steps, otherwise laid out
        plan = plan_steps(example_lengths(examples), 11, 1, seed=0, rows=rows, row_length=32)
        batches = BatchIterator(plan, examples, mesh, VALUES)
        step = jax.jit(
            make_train_step(objective, optimizer, lambda step: 0.3, num_steps=len(plan)),
            out_shardings=(shardings, None),
        )
        with jax.set_mesh(mesh):
            state, seen = jax.device_put(begin(params), shardings), []
            for _ in range(len(plan)):
                state, metrics = step(state, next(batches))
                seen.append((jax.device_get(state), {k: float(v) for k, v in metrics.items()}))
        return seen

    def relative(got, expected):
        return float(np.abs(got - expected).max() / np.abs(expected).max())

    found = []
    for (state, metrics), (one, expected) in zip(on_mesh((2, 2, 2)), on_mesh((1, 1, 1)), strict=True):
        found.append(
            {
                "alpha": metrics["alpha"],
                "metrics": {k: abs(v - expected[k]) / max(abs(expected[k]), 1e-3) for k, v in metrics.items()},
                "kept": max(map(relative, *map(jax.tree.leaves, (state.objective_state, one.objective_state)))),
                "params": {k: relative(v, flatten(one.params)[k]) for k, v in flatten(state.params).items()},
            }
        )
    return found


def test_steps_equal_one_device(run_python):
    out = run_python("-m", "tests.multi_device.test_supervised", devices=8, timeout=600)
    steps = json.loads(out.splitlines()[-1])
    assert len(steps) > 2 and len({step["alpha"] for step in steps}) == len(steps)
    for step in steps:
        assert {"loss", "alpha", "loss/seed", "loss/synthetic", "mean_token_accuracy"} <= set(step["metrics"])
        for what in ("metrics", "params"):
            assert max(step[what].values()) < RTOL, {k: v for k, v in step[what].items() if v >= RTOL}
        assert step["kept"] < RTOL


if __name__ == "__main__":
    print(json.dumps(computed()))
