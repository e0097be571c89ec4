"""The 4-bit NormalFloat of QLoRA (nf4, arXiv 2305.14314, section 3) and the way back from it.

A projection's `kernel` [*C, *F] is kept in blocks of the contracted axes, C flattened, as `kernel_codes` uint8
[blocks, block / 2, *F] and `kernel_scales` float32 [blocks, *F]. A code is an index into the 16 values; in a byte's low
half is one of the block's first half, in its high half one of the second. Packed here, because XLA slices no 4-bit
arrays on CPU: it widened those of all layers for every step. `lm_jax.models.quantized` makes them.
"""

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


def pack(codes: jax.Array) -> jax.Array:
    """[blocks, block, F] of 0 .. 15, an even number a block -> [blocks, block / 2, F] uint8."""
    low, high = jnp.split(codes.astype(jnp.uint8), 2, axis=1)
    return low | high << 4


def dequantize(packed: jax.Array, scales: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """The weight that nf4 codes stand for, multiplied in fp32, as `shape` in `dtype`.

    Args:
      packed: [blocks, block / 2, *F] uint8, as `pack` has it.
      scales: [blocks, *F] float32.
    """
    # Tied to the codes, which change from layer to layer: else XLA spreads each value out to a weight's shape, once
    # before the scan over layers, and keeps all 16 of them.
    packed, table = jax.lax.optimization_barrier((packed, jnp.array(NF4, jnp.float32)))
    codes, values = jnp.concatenate([packed & 15, packed >> 4], axis=1), list(table)
    for i in range(4):  # selects, one a bit of the code: from a table a TPU gathers each value by itself
        bit = (codes >> i) & 1 == 1
        values = [jnp.where(bit, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return (values[0] * scales[:, None]).reshape(shape).astype(dtype)
