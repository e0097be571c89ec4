"""The programs that commands compile, lowered for devices from settings and shapes alone: no weights, no data.

Every function lowers what the command itself runs, with the shapes that it would be given.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.config import BatchConfig, ComputeConfig, DecodeConfig, LoraConfig, ModelConfig, OptimConfig
from lm_jax.data.order import batch_shapes, check_batch
from lm_jax.inference.sampling import decode_shapes
from lm_jax.inference.scoring import packed_logprobs, scoring_settings
from lm_jax.planning.traced import MatmulFlops, matmul_flops
from lm_jax.training.flops import forward_flops, train_flops
from lm_jax.training.program import StepSpec, step_program
from lm_jax.training.runs import abstract_params
