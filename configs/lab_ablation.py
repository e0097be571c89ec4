"""The arms of MuSC and MAIN on seed models of a small verifiable world, where every answer can be checked.

    python -m launch.lab_ablation --config=configs/lab_ablation.py --config.output=runs/lab_musc
    python -m launch.lab_ablation --config=configs/lab_ablation.py --config.output=runs/lab_main --config.method=main

Expect: a seed model for each seed, what its arms share, learning rates, then a line for every step (the whole output
is below `logs/`; of steps that run alone it is shown). `report.md` is the table and `report.json` the numbers, written
anew after every arm; `METHOD.png`, at the end, the picture; `compiled/` what steps share, where
JAX_COMPILATION_CACHE_DIR does not say it. The same command goes on after an interruption: an arm whose `result.json` is
there is not run again. More `seeds` and other `arms` may be given to the same output.

Presets: `:short` is for a test: one seed, DPO with NLL on MuSC's pairs, and what MAIN's filter keeps. With the
quickstart's seed model, `--config.fitted=runs/quickstart/seed`, it takes three to five minutes on two cores.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(preset: str = "") -> ConfigDict:
    c = ConfigDict()
    c.output = placeholder(str)  # directory
    c.method = "musc"  # musc | main | both
    c.world = "lists"  # lists | trips; no setting is tuned on trips
    c.seeds = (0, 1, 2, 3, 4)  # each has its own seed model and data; less than five leave wide intervals
    c.arms = ()  # names, as they stand in the table; none: all
    c.fitted = placeholder(str)  # directory of a seed model that is there, as launch.lab_seed leaves it; for one seed
    c.seed_rows = 60000  # what others are fitted on, as configs/lab_seed.py has it
    c.gate = 0.9  # a seed model below it ends the run
    c.rate_seeds = ()  # whose development splits choose an arm's learning rate for all; none: the first of seeds
    c.dev = 512  # held-out instructions of such a split
    c.test = 512  # other ones that are reported: one standard error of an arm is about two points
    c.temperature = 0.5  # of measured answers, besides greedy ones; MuSC's own
    c.processes = 2  # arms at a time; one process of a model this small keeps less than two cores busy

    c.musc = ConfigDict()
    c.musc.instructions = 1536  # that every arm makes its pairs of
    c.musc.epochs = 2  # of every training
    c.musc.rates = (1e-4, 2e-4, 4e-4)  # of preference training; each arm's best on the development splits
    c.musc.tuning_rates = (1e-4, 3e-4, 1e-3)  # of supervised tuning, likewise
    c.musc.oracle_samples = 8  # responses among which the verifiers choose
    c.musc.oracle_temperature = 0.7  # they must differ

    c.main = ConfigDict()
    # The stage of the seed model that all begin with. clean has met instructions of up to two constraints; pretraining
    # none with its response, and its instructions are true in one case of ten
    c.main.base = "clean"
    c.main.pairs = 400  # seed pairs
    c.main.responses = 800  # without instructions
    c.main.probes = 256  # pairs that the filter's scores have to tell from shuffled ones
    c.main.rounds = 1  # that arms have which name none
    c.main.epochs = 6  # of every training; arms with more pairs take more steps
    c.main.rates = (5e-4, 1e-3, 2e-3)  # of the last training; each arm's best on the development splits
    c.main.rounds_rate = 1e-3  # of forward and reverse models, which the arms share
    c.main.adapter_rate = 5e-3  # the same of adapters
    c.main.adapter_rank = 16

    if preset == "short":
        c.method = "both"
        c.seeds = (0,)
        c.arms = ("seed", "dpo_nll")
        c.test = 768
        c.processes = 1
        c.musc.rates = (2e-4,)
        c.musc.instructions = 3072
        c.main.pairs = 300
        c.main.responses = 400
        c.main.probes = 128
    elif preset:
        raise ValueError(f"unknown preset {preset!r}; choose short or none")
    return c
