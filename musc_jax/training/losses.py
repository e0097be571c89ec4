"""Token-aware preference losses: arrays in, per-pair losses out. No model, no mean, no configuration objects.

Axes: P pairs. Every loss takes sums over a response's tokens that the caller formed with per-token weights w_t
(MuSC, arXiv 2502.11541, section 3.3), so that with all weights 1 each is the published pair-level form.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lm_jax.errors import UserError

KINDS = ("sigmoid", "robust", "ipo", "hinge", "simpo")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    kind: str = "sigmoid"  # one of KINDS
    beta: float = 0.1  # strength of the pull to the reference; IPO's tau; SimPO's beta
    label_smoothing: float = 0.0  # share of pairs assumed mislabelled (sigmoid: conservative DPO; robust: unbiased)
    simpo_gamma: float = 0.5  # SimPO's target margin
    nll_weight: float = 0.0  # of the chosen responses' mean -log p a token, without token weights (TRL: sft)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"config.loss.kind: unknown loss {self.kind!r}; choose from {', '.join(KINDS)}")
        if not 0 < self.beta < math.inf:
            raise UserError(f"config.loss.beta: must be positive, got {self.beta}")
        if not 0 <= self.nll_weight < math.inf:
            raise UserError(f"config.loss.nll_weight: must be a number of at least 0, got {self.nll_weight}")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"config.loss.label_smoothing: must lie in [0, 0.5), got {self.label_smoothing}")
        if self.label_smoothing and self.kind not in ("sigmoid", "robust"):
            raise UserError(f"config.loss.label_smoothing: not defined for {self.kind}; set it to 0")

    @property
    def needs_reference(self) -> bool:
        """SimPO alone has none."""
        return self.kind != "simpo"


def sigmoid_loss(margin: jax.Array, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """-log sigmoid(beta * margin) (DPO, arXiv 2305.18290, eq. 7), smoothed as in conservative DPO.

    Args:
      margin: [P] weighted log-ratio of the chosen response minus that of the rejected one.

    >>> round(float(sigmoid_loss(jnp.zeros(1), 0.1)[0]), 6)
    0.693147
    """
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(beta * margin) - label_smoothing * jax.nn.log_sigmoid(
        -beta * margin
    )


def robust_loss(margin: jax.Array, beta: float, label_smoothing: float) -> jax.Array:
    """The unbiased estimate of DPO's loss under flipped labels (robust DPO, arXiv 2403.00409, eq. 12). margin: [P]."""
    clean = (1 - label_smoothing) * jax.nn.log_sigmoid(beta * margin)
    flipped = label_smoothing * jax.nn.log_sigmoid(-beta * margin)
    return (flipped - clean) / (1 - 2 * label_smoothing)


def ipo_loss(mean_margin: jax.Array, beta: float) -> jax.Array:
    """(margin - 1 / (2 beta))^2 (IPO, arXiv 2310.12036, eq. 17). mean_margin: [P], per-token means' difference."""
    return (mean_margin - 1 / (2 * beta)) ** 2


def hinge_loss(margin: jax.Array, beta: float) -> jax.Array:
    """max(0, 1 - beta * margin) (SLiC, arXiv 2305.10425). margin: [P]."""
    return jax.nn.relu(1 - beta * margin)


def simpo_loss(mean_margin: jax.Array, beta: float, gamma: float) -> jax.Array:
    """-log sigmoid(beta * margin - gamma) (SimPO, arXiv 2405.14734, eq. 6).

    mean_margin: [P], the policy's per-token mean log-prob of the chosen response minus the rejected one's.
    """
    return -jax.nn.log_sigmoid(beta * mean_margin - gamma)


def preference_loss(
    config: LossConfig, logratio_sums: jax.Array, logprob_sums: jax.Array, token_counts: jax.Array
) -> jax.Array:
    """The configured loss of each pair, without the NLL term.

    Args:
      logratio_sums: [P, 2] sum over response tokens of w_t * (log pi - log ref), chosen then rejected.
      logprob_sums: [P, 2] sum of w_t * log pi.
      token_counts: [P, 2] response tokens. The means of IPO and SimPO divide by these, not by the sum of weights, so
        that scaling all weights scales the margin as it does in the other forms.

    Returns:
      [P] fp32.
    """

    def difference(x):
        return x[:, 0] - x[:, 1]

    counts = jnp.maximum(token_counts, 1)
    margin = difference(logratio_sums)
    match config.kind:
        case "sigmoid":
            return sigmoid_loss(margin, config.beta, config.label_smoothing)
        case "robust":
            return robust_loss(margin, config.beta, config.label_smoothing)
        case "hinge":
            return hinge_loss(margin, config.beta)
        case "ipo":
            return ipo_loss(difference(logratio_sums / counts), config.beta)
        case "simpo":
            return simpo_loss(difference(logprob_sums / counts), config.beta, config.simpo_gamma)
    raise ValueError(f"no loss {config.kind!r}")  # LossConfig refuses it


def segment_sums(values: jax.Array, segment_ids: jax.Array, num_pairs: int) -> jax.Array:
    """Sums over the tokens of each response of each pair of each row.

    Args:
      values: [B, T], zero outside responses.
      segment_ids: [B, T]; pair p of a row has segments 2p + 1 (chosen) and 2p + 2 (rejected).
      num_pairs: P, pairs that a row can hold.

    Returns:
      [B, P, 2] fp32, chosen then rejected.
    """
    member = segment_ids[:, None, :] == 1 + jnp.arange(2 * num_pairs)[:, None]  # [B, 2P, T]
    sums = jnp.sum(jnp.where(member, values[:, None, :].astype(jnp.float32), 0.0), axis=-1)
    return sums.reshape(values.shape[0], num_pairs, 2)
