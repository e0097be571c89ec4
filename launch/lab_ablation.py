r"""The arms of MuSC and MAIN measured on a small verifiable world: means over seeds, intervals, paired tests.

    python -m launch.lab_ablation --config=configs/lab_ablation.py --config.output=runs/lab_musc
    python -m launch.lab_ablation --config=configs/lab_ablation.py:short --config.output=runs/lab_short
"""

from launch import cli


def command():
    from lab.ablation import LabAblationConfig, ablate
    from musc_jax.weights.rules import DEFAULT_RULE, WEIGHING_RULES

    rules = (DEFAULT_RULE, *(rule for rule in WEIGHING_RULES if rule != DEFAULT_RULE))
    return LabAblationConfig, lambda config: ablate(config, rules, controls_of_main())


def controls_of_main():
    """What the lab, which knows no method, is handed of MAIN."""
    from lab.controls import arms as controls
    from lab.main_arms import Controls
    from main_jax.filter.auroc import auroc
    from main_jax.filter.scores import DEFAULT_SCORE, SCORES
    from main_jax.training.weighting import RULES

    return Controls(
        about=controls.ARMS,
        score=DEFAULT_SCORE,
        scores=tuple(SCORES),
        rule=RULES[0],
        select=controls.arm_pairs,
        shuffled=controls.shuffled,
        depth_of=controls.depth_of,
        alpha_of=controls.alpha_of,
        trained_as=controls.trained_as,
        auroc=lambda real, wrong: auroc(real, wrong).value,
    )


if __name__ == "__main__":
    cli.run(command)
