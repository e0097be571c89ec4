"""Contraction of activations with a weight, with a gradient that needs no transposed copies.

Autodiff of `dot_general` asks for the weight gradient in transposed order; XLA on CPU then evaluates whatever produced
the operands once more in column order, which made a feed-forward layer's backward pass over twice as slow. Written out,
every contraction has its operands as they lie. The weight gradient also accumulates in the weight's own dtype, fp32 for
master weights, whatever the compute dtype.
"""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm_jax.models.nf4 import CODES, SCALES, dequantize

P = ParamSpec("P")
R = TypeVar("R")


def matmul_precision(dtype: str) -> contextlib.AbstractContextManager:
    """To trace a program under that computes in `dtype`: makes float32 mean float32, in kernels and gradients too.

    TPUs would multiply fp32 matrices in bf16 passes and newer NVIDIA cards in TF32. Gradients that are written out are
    traced after the forward pass, so the whole of a jitted program has to lie in it. Bf16 is left as it is: kernels
    have products of fp32 in between, which may stay fast.
    """
    return jax.default_matmul_precision("highest") if dtype == "float32" else contextlib.nullcontext()


def in_compute_dtype(program: Callable[P, R]) -> Callable[P, R]:
    """Traces `program` under the `matmul_precision` of its argument `compute`; goes below `jax.jit`."""
    signature = inspect.signature(program)

    @functools.wraps(program)
    def traced(*args: P.args, **kwargs: P.kwargs) -> R:
        with matmul_precision(signature.bind(*args, **kwargs).arguments["compute"].dtype):
            return program(*args, **kwargs)

    return traced


@functools.partial(jax.custom_vjp, nondiff_argnames=("num_axes", "out_dtype"))
def contract(x: jax.Array, weight: jax.Array, num_axes: int = 1, out_dtype=None) -> jax.Array:
    """Contracts the last `num_axes` axes of x with the first ones of the weight, in x's dtype.

    Args:
      x: [..., *C], C the contracted axes.
      weight: [*C, *F] in any float dtype; cast to x's. Its gradient is in its own dtype.
      num_axes: how many axes C has.
      out_dtype: of the result; None: x's.

    Returns:
      [..., *F].
    """
    contracted = range(x.ndim - num_axes, x.ndim), range(num_axes)
    return _dot(x, weight.astype(x.dtype), contracted, out_dtype or x.dtype)


def _forward(x, weight, num_axes, out_dtype):
    # Not by way of `contract`: a remat policy sees only the primitives that lie open here.
    contracted = range(x.ndim - num_axes, x.ndim), range(num_axes)
    return _dot(x, weight.astype(x.dtype), contracted, out_dtype or x.dtype), (x, weight)


def _backward(num_axes, out_dtype, residuals, grad):
    x, weight = residuals
    grad = grad.astype(x.dtype)
    batch, features = range(x.ndim - num_axes), range(num_axes, weight.ndim)
    d_x = _dot(grad, weight.astype(x.dtype), (range(grad.ndim - len(features), grad.ndim), features), x.dtype)
    return d_x, _dot(x, grad, (batch, batch), weight.dtype)


contract.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnames=("out_dtype",))
def contract_rows(x: jax.Array, rows: jax.Array, out_dtype=None) -> jax.Array:
    """As `contract`, for a weight whose rows are the features: [..., D] with [F, D] gives [..., F]."""
    return _dot(x, rows.astype(x.dtype), ((x.ndim - 1,), (1,)), out_dtype or x.dtype)


def _rows_forward(x, rows, out_dtype):
    return contract_rows(x, rows, out_dtype), (x, rows)


def _rows_backward(out_dtype, residuals, grad):
    x, rows = residuals
    grad = grad.astype(x.dtype)
    batch = range(x.ndim - 1)
    d_x = _dot(grad, rows.astype(x.dtype), ((grad.ndim - 1,), (0,)), x.dtype)
    return d_x, _dot(grad, x, (batch, batch), rows.dtype)


contract_rows.defvjp(_rows_forward, _rows_backward)


def _dot(a, b, contracted, dtype):
    ours, theirs = (tuple(axes) for axes in contracted)
    return jax.lax.dot_general(a, b, ((ours, theirs), ((), ())), preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnames=("num_axes",))
def contract_nf4(x: jax.Array, codes: jax.Array, scales: jax.Array, num_axes: int = 1) -> jax.Array:
    """As `contract`, with a frozen weight in nf4. Each pass dequantises it, so that only codes are kept."""
    return _nf4_forward(x, codes, scales, num_axes)[0]


def _nf4_forward(x, codes, scales, num_axes):
    shape = (*x.shape[x.ndim - num_axes :], *scales.shape[1:])
    contracted = range(x.ndim - num_axes, x.ndim), range(num_axes)
    return _dot(x, dequantize(codes, scales, shape, x.dtype), contracted, x.dtype), (codes, scales, shape)


def _nf4_backward(num_axes, residuals, grad):
    codes, scales, shape = residuals
    features = range(num_axes, len(shape))
    weight = dequantize(codes, scales, shape, grad.dtype)
    d_x = _dot(grad, weight, (range(grad.ndim - len(features), grad.ndim), features), grad.dtype)
    return d_x, None, None


contract_nf4.defvjp(_nf4_forward, _nf4_backward)


LORA_A, LORA_B = "lora_a", "lora_b"
LORA_KEY, LORA_KEEP = "lora_key", "lora_keep"


class Linear(nn.Module):
    """y = x W + b over the last `num_axes` axes of x. Parameters: kernel [*C, *F] and, with a bias, bias [*F]; fp32.

    In the place of `kernel` may stand `kernel_codes` and `kernel_scales`, frozen; see `lm_jax.models.nf4`.
    Where the parameters hold `lora_a` [*C, r] and `lora_b` [r, *F] too, (x A) B is added; see `lm_jax.models.lora`.
    With `lora_key` and `lora_keep`, scalars, each element of that x stays with the probability `lora_keep`.
    """

    features: tuple[int, ...]
    use_bias: bool = False
    num_axes: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.has_variable("params", CODES):
            codes: jax.Array = self.get_variable("params", CODES)
            scales: jax.Array = self.get_variable("params", SCALES)
            y = contract_nf4(x, codes, scales, self.num_axes)
        else:
            shape = x.shape[x.ndim - self.num_axes :] + self.features
            fan_in = math.prod(shape[: self.num_axes])
            kernel = self.param("kernel", nn.initializers.normal(fan_in**-0.5), shape, jnp.float32)
            y = contract(x, kernel, self.num_axes)
        if self.has_variable("params", LORA_A):
            a: jax.Array = self.get_variable("params", LORA_A)
            b: jax.Array = self.get_variable("params", LORA_B)
            y = y + contract(contract(self._kept(x), a, self.num_axes), b)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, self.features, jnp.float32).astype(x.dtype)
        return y

    def _kept(self, x: jax.Array) -> jax.Array:
        if not self.has_variable("params", LORA_KEY):
            return x
        key: jax.Array = self.get_variable("params", LORA_KEY)
        keep: jax.Array = self.get_variable("params", LORA_KEEP)
        return jnp.where(jax.random.bernoulli(key, keep, x.shape), x / keep.astype(x.dtype), 0)
