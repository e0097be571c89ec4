"""The 4-bit NormalFloat of QLoRA (nf4, arXiv 2305.14314, section 3) and the way back from it.

A projection's `kernel` [*C, *F] is kept as `kernel_codes` uint4 [*C, *F], indices into the 16 values, and
`kernel_scales` float32 [blocks, *F]; `lm_jax.models.quantized` makes them.
"""

import math

import jax
import jax.numpy as jnp

CODES, SCALES = "kernel_codes", "kernel_scales"
# The 16 values of 4-bit NormalFloat: arXiv 2305.14314, appendix E
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def dequantize(codes: jax.Array, scales: jax.Array, num_axes: int, dtype) -> jax.Array:
    """The weight that nf4 codes stand for, multiplied in fp32 and returned in `dtype`.

    Args:
      codes: [*C, *F] uint4.
      scales: [blocks, *F] float32, each of prod(C) / blocks codes that follow each other along C flattened.
      num_axes: how many axes C has.
    """
    wide, values = codes.astype(jnp.int32), [jnp.float32(v) for v in NF4]
    for i in range(4):  # selects, one a bit of the code: a lookup in a table is slow on TPU and no vector code on CPU
        bit = (wide >> i) & 1 == 1
        values = [jnp.where(bit, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    blocks, *features = scales.shape
    block = math.prod(codes.shape[:num_axes]) // blocks
    weight = values[0].reshape(blocks, block, *features) * scales[:, None]
    return weight.reshape(codes.shape).astype(dtype)
