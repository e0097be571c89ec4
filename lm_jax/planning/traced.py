"""Counts the matmuls that a traced program runs, recomputation included, before any compiler has seen it."""

import math
from collections.abc import Iterator

import jax
from jax.interpreters.partial_eval import dce_jaxpr


def matmul_flops(traced: jax.stages.Traced) -> float:
    """FLOPs of all devices together, 2 per multiply-add, of every matmul whose number of runs the program says.

    Of branches the costliest counts. Loops whose length depends on the data, as attention's over the blocks that a
    query sees, and kernels are left out.
    """
    # What nobody reads no compiler keeps, such as gradients of frozen weights
    jaxpr, _ = dce_jaxpr(traced.jaxpr.jaxpr, [True] * len(traced.jaxpr.jaxpr.outvars))
    return _flops(jaxpr)


def _flops(jaxpr) -> float:
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(equation) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
    if name in ("while", "pallas_call"):
        return 0.0
    if name == "cond":
        return max(_flops(branch.jaxpr) for branch in params["branches"])
    times = params["length"] if name == "scan" else 1
    if name == "shard_map":  # shapes inside are those of one device along the axes that it takes over
        axes = next(params[key] for key in ("newly_manual_axes", "manual_axes") if key in params)  # by version
        times = math.prod(params["mesh"].shape[axis] for axis in axes)
    return times * sum(map(_flops, _inside(params)))


def _inside(params) -> Iterator:
    for value in params.values():
        for item in value if isinstance(value, (list, tuple)) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner
