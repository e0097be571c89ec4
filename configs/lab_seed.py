"""The seed model of a small verifiable world, fitted from nothing.

    python -m launch.lab_seed --config=configs/lab_seed.py --config.output=runs/lab_seed

Expect: three stages of `launch.main_train`, an export, greedy decoding on held-out instructions, and a line of shares.
An error ends it where the model copies words or decomposes instructions in less than nine cases of ten: no method can
amplify what the seed does not half know. `model/` is the seed model, `data/` the rows that it was fitted on,
`pretraining/` a run that has seen no instruction with its response yet. The same command goes on with the stages that
are missing after an interruption.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.world = "lists"  # lists | trips; no setting is tuned on trips
    c.output = placeholder(str)  # directory
    c.seed = 0  # of the rows, the model's start and the order
    c.rows = 60000  # in all three stages, 3.6M tokens; of 50,000 decompositions are less exact
    c.learning_rate = 3e-3  # the peak; a model this small takes it
    c.batch_examples = 28  # rows a step; about 1,900 tokens in the last two stages
    c.max_length = 320  # the longest row, a decomposition with one in-context example, has fewer tokens
    # What prompts of your own say beside the world's words, so that the tokenizer knows it; these are MAIN's
    c.words = (
        "Answer as a helpful assistant does. Answer as a text found on the web does. Below is a response that an "
        "assistant gave. Write the one instruction, question or request that it answers, and nothing else. Response:"
    )
    c.gate = 0.9  # of start-with and of simple decompositions, exact; a seed below teaches nothing about a method
    c.gate_rows = 128  # held-out instructions of each sort
    return c
