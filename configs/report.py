"""A page to look at: preference pairs side by side, every token tinted by its weight. One file, no network.

    python -m launch.report --config=configs/report.py --config.model=DIR \
        --config.input=weighed.jsonl --config.output=page.html

Expect: page.html, which any browser opens. Without a model the texts are shown without tokens and weights. Use the same
`max_length` as in training: the page shows the tokens that training sees. Presets: `:tiny`, as of
`configs/musc_train.py`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(preset: str = "") -> ConfigDict:
    c = ConfigDict()
    c.model = placeholder(str)  # whose tokenizer cuts the responses; its weights are not read
    c.input = placeholder(str)  # preference rows, with columns of launch.musc_pairs or launch.musc_token_weights or not
    c.columns = ""  # ours=yours: "prompt=question,chosen=best" (docs/data.md); none: by their own names
    c.max_dropped_share = 0.01  # of a file's rows that may be faulty and are left out; with more nothing is written
    c.output = placeholder(str)  # HTML, local, gs:// or s3://; appears when it is whole
    c.chat_template_kwargs = ""  # JSON for the chat template: {"enable_thinking": false}; a row's own column goes first
    c.counts = placeholder(str)  # the tally of launch.musc_pairs; none: INPUT.counts.json where there is one
    c.weights = "auto"  # as in configs/musc_train.py; of a store the page has every rule, this one first
    c.max_pairs = 200  # a few MB; 1,000 are fine in a browser too
    c.seed = placeholder(int)  # where there are more: which to draw; none: evenly spaced ones
    c.max_length = 2048  # tokens of prompt + response

    if preset == "tiny":
        c.max_length = 1024
    elif preset:
        raise ValueError(f"unknown preset {preset!r}; choose tiny or none")
    return c
