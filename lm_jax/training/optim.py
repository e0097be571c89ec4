"""Learning-rate schedule and optimiser chain, from an OptimConfig."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from lm_jax.config import OptimConfig
from lm_jax.models.linear import LORA_A, LORA_B
from lm_jax.models.weights import WeightSpec

_MATRICES = ("kernel", "embedding", LORA_A, LORA_B)
_ADAM_RMS = 0.4  # of an entry of AdamW's update over the learning rate, which lies between 0.2 and this


def make_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then the named decay to `final_ratio` of the peak at the last step.

    Steps count from 0 and the warm-up takes ceil(warmup_ratio * num_steps) of them, as in transformers, so that the
    curves of a run here and one there can be laid over each other.
    """
    peak, final = config.learning_rate, config.final_ratio
    warmup = math.ceil(config.warmup_ratio * num_steps)

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / max(num_steps - warmup, 1), 0.0, 1.0)
        decay = {
            "cosine": final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress)),
            "linear": final + (1 - final) * (1 - progress),
            "constant": jnp.ones(()),
        }[config.schedule]
        return peak * jnp.where(step < warmup, step / max(warmup, 1), decay)

    return schedule


def make_optimizer(
    config: OptimConfig, schedule: optax.Schedule, table: Sequence[WeightSpec] = ()
) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW or Muon, with decay on matrices only, adapters' among them (not norms or biases).

    Moments are kept in the parameters' dtype, fp32 for fp32 master weights. Muon's updates are scaled to AdamW's size
    (arXiv 2502.16982, section 2.2), so that one learning rate does for both.

    Args:
      table: of the model's weights; muon reads from it which axes of a kernel are its rows and columns.
    """
    chosen = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_is_matrix,
    )
    if config.name == "muon":
        dimensions = functools.partial(_rows_and_columns, table=table)
        on_kernels = muon(
            schedule,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=dimensions,
            consistent_rms=_ADAM_RMS,
        )
        labels = lambda params: jax.tree.map(  # noqa: E731
            lambda x: "adamw" if x is None else "muon", dimensions(params), is_leaf=lambda x: x is None or _is_dims(x)
        )
        chosen = optax.partition({"muon": on_kernels, "adamw": chosen}, labels)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), chosen) if config.clip_norm else chosen


def _is_dims(x) -> bool:
    return isinstance(x, MuonDimensionNumbers)


def _rows_and_columns(params, table: Sequence[WeightSpec]):
    """Of each layer's kernel, layers apart; None for what AdamW takes."""
    kernels = {spec.path: spec for spec in table if spec.stacked and spec.path.endswith("/kernel")}

    def dimensions(path, _):
        spec = kernels.get("/".join(part.key for part in path))
        if spec is None:
            return None
        columns, rows = (tuple(spec.axes.index(axis) for axis in group) for group in spec.hf_groups)
        return MuonDimensionNumbers(reduction_axis=rows, output_axis=columns)

    return jax.tree_util.tree_map_with_path(dimensions, params)


def _is_matrix(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in _MATRICES, params)
