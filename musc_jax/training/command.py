"""`launch.musc_train`: token-aware preference optimisation of a policy on preference rows, start to finish."""

import dataclasses
from collections.abc import Sequence

import jax

from lm_jax.checkpoints.provenance import Method
from lm_jax.checkpoints.runs import ModelSource, open_model, param_specs
from lm_jax.config import FULL, ModelConfig, OptimConfig, PairBatch
from lm_jax.console import say
from lm_jax.data.batches import AuxiliaryBatch
from lm_jax.data.packing import Example
from lm_jax.distributed.processes import everywhere
from lm_jax.errors import UserError
from lm_jax.planning.programs import Program, score_program, train_program
from lm_jax.training.objective import Objective, name_of
from lm_jax.training.trainer import Data, TrainConfig, Trainer
from musc_jax.training.examples import Pairs, load_pairs
from musc_jax.training.losses import LossConfig
from musc_jax.training.objective import PairLoss, preference_objective
from musc_jax.training.reference import no_scores, reference_scores, weighted_pairs
from musc_jax.weights.online import auxiliary_responses, auxiliary_rows, online_weights
from musc_jax.weights.rules import CHOSEN, REJECTED, RULES_ON_SCORES, check_rule, online_rule


@dataclasses.dataclass(frozen=True)
class MuscTrainConfig(TrainConfig):
    """`configs/musc_train.py` says what each key is for and why it has its value."""

    batch: PairBatch = PairBatch()
    optim: OptimConfig = OptimConfig(learning_rate=5e-7, warmup_ratio=0.1)
    reference: str | None = None
    weights: str = "auto"
    loss: LossConfig = LossConfig()
    reference_cache: str | None = None

    def __post_init__(self):
        check_rule(self.weights)
        super().__post_init__()


def train(config: MuscTrainConfig, pair_loss: PairLoss | None = None) -> None:
    """Runs, or continues, the training that `config` describes; see the module's docstring of `launch.musc_train`.

    Args:
      pair_loss: another loss than `config.loss` knows; see `preference_objective`.

    Raises:
      UserError: anything the user can mend.
    """
    trainer = Trainer(config)
    reference = open_reference(config, trainer)
    pairs, auxiliary = _load(config.input, config, trainer, config.weights)
    read, rule = [(pairs, auxiliary)], pairs.rule
    if config.eval_input:
        read.append(_load(config.eval_input, config, trainer, rule))
    whole = [_all_read(*own) for own in read]
    faults = [own.faults for own, _ in read]
    scored_by = reference if _needs_scores(config, rule) else None
    kind, command = config.loss.kind, "musc_train"
    if pair_loss is not None:  # the run's settings do not hold it, and another one must not go on with the run
        kind = name_of(pair_loss)
        command = f"musc_jax.train with the loss {kind}"
    trainer.begin(command, _method(config, rule, kind), faults, whole, scored_by)
    examples = _examples(config, rule, trainer, reference, [own for own, _ in read])
    say(f"weights: {rule}")
    data = [
        Data(own, pairs.name, auxiliary, (CHOSEN, REJECTED))
        for own, (pairs, auxiliary) in zip(examples, read, strict=True)
    ]
    trainer.fit(
        objective_of(config, trainer.policy.config, rule, pair_loss),
        data[0],
        data[1] if config.eval_input else None,
        shown={"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"},
    )


def _all_read(pairs: Pairs, auxiliary: AuxiliaryBatch | None) -> list[Example]:
    """Each pair's segments, chosen then rejected, and those that travel with it."""
    along = auxiliary.examples if auxiliary else [()] * len(pairs.segments)
    return [
        (*pairs.segments[i : i + 2], *(segment for example in along[i : i + 2] for segment in example))
        for i in range(0, len(pairs.segments), 2)
    ]


def _needs_scores(config: MuscTrainConfig, rule: str) -> bool:
    """Whether the reference has to score the responses."""
    return config.loss.needs_reference or rule in RULES_ON_SCORES


def _load(path: str, config: MuscTrainConfig, trainer: Trainer, weights: str) -> tuple[Pairs, AuxiliaryBatch | None]:
    """The pairs of a file, and what travels with the batches for weights that the policy computes."""
    online, auxiliary = online_rule(weights), None
    limits = config.columns, config.max_dropped_share
    pairs = load_pairs(path, trainer.encoder, weights, None, *limits, last=not online)
    if online:
        pairs, auxiliary = auxiliary_responses(pairs, online, trainer)
    say("\n".join(pairs.report))
    return pairs, auxiliary


def _method(config: MuscTrainConfig, rule: str, kind: str) -> Method:
    plain = rule == "uniform" and kind == "sigmoid"
    what = "Direct preference optimisation" if plain else "Token-aware preference optimisation"
    return Method(
        f"{what} as in MuSC ([arXiv 2502.11541](https://arxiv.org/abs/2502.11541)): loss `{kind}`, "
        f"beta {config.loss.beta:g}, token weights `{rule}`.",
        ("musc", "dpo", "preference-optimization"),
    )


def objective_of(
    config: MuscTrainConfig, model: ModelConfig, rule: str, pair_loss: PairLoss | None = None
) -> Objective:
    """What is minimised.

    Args:
      rule: where the weights are from. Whatever is no `online` rule comes along with the batch, so that before the data
        are read `config.weights` itself will do.
    """
    if not (online := online_rule(rule)):
        return preference_objective(model, config.compute, config.loss, pair_loss=pair_loss)
    weigh = online_weights(online, model, config.compute)
    objective = preference_objective(model, config.compute, config.loss, weigh, pair_loss)
    return dataclasses.replace(objective, values=("ref_logprobs",), auxiliary=auxiliary_rows(online))


def musc_programs(config: MuscTrainConfig, model: ModelConfig, mesh: jax.sharding.Mesh) -> list[Program]:
    """What `train` compiles: the step and, for a loss that reads a reference, its pass."""
    programs = [train_program(config, model, objective_of(config, model, config.weights), mesh)]
    if config.loss.needs_reference:
        precision = FULL if config.reference else config.lora.base
        batch = config.forward_batch(mesh)
        programs.append(score_program(batch, config.compute, config.max_length, model, mesh, precision))
    return programs


def open_reference(config: MuscTrainConfig, trainer: Trainer) -> ModelSource:
    """The frozen model: `config.reference`, else the policy where it starts, on a base in nf4 if the policy's is.

    Raises:
      UserError: none there, or one that reads other tokens or does not fit the mesh.
    """
    if not config.reference:
        return trainer.policy
    reference = open_model(config.reference)
    if trainer.policy.precision != FULL and everywhere(lambda: reference.fingerprint == trainer.policy.fingerprint):
        return trainer.policy  # named or not, it is the base below the adapters
    ours, its = trainer.policy.config.vocab_size, reference.config.vocab_size
    if its != ours:
        raise UserError(
            f"{config.reference}: its vocabulary has {its} tokens, that of {config.model} {ours}; the reference must "
            "read the same tokens"
        )
    param_specs(reference.config, trainer.mesh)  # raises where the mesh does not fit it, before anything is written
    return reference


def _examples(
    config: MuscTrainConfig, rule: str, trainer: Trainer, reference: ModelSource, read: Sequence[Pairs]
) -> Sequence[Sequence[Example]]:
    """(chosen, rejected) segments with weights and reference log-probs, of each set of pairs."""
    segments = [segment for pairs in read for segment in pairs.segments]
    if _needs_scores(config, rule):
        cache = config.reference_cache or f"{config.output}/reference"
        batch = config.forward_batch(trainer.mesh)
        scores = reference_scores(segments, reference, cache, config.compute, batch, trainer.mesh)
    else:
        scores = no_scores(segments)
    examples, first = weighted_pairs(segments, scores, rule), len(read[0])
    return [examples[:first], examples[first:]][: len(read)]
