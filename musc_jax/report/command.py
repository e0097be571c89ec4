"""`launch.report`: preference rows -> one HTML file that shows them (MuSC's inspection; nothing is computed anew)."""

import base64
import dataclasses
import hashlib
import html
import importlib.resources
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from lm_jax.checkpoints.runs import open_model
from lm_jax.console import say
from lm_jax.data.columns import RowKeys
from lm_jax.data.rows import check_file_output, check_not_input, replacing
from lm_jax.data.text import TextEncoder
from lm_jax.data.tokenizers import end_token_ids, load_tokenizer
from lm_jax.errors import UserError
from musc_jax import draws
from musc_jax.report.pairs import pair_record, token_records
from musc_jax.training.examples import Choose, load_pairs, read_pairs
from musc_jax.weights.rules import AUTO, CONTEXTS, FROM_COLUMNS, FROM_STORE, WEIGHING_RULES, check_rule

_SCRIPTS = ("data.js", "state.js", "tokens.js", "charts.js", "cards.js", "main.js")


@dataclasses.dataclass(frozen=True)
class ReportConfig(RowKeys):
    """`configs/report.py` says what each key is for."""

    addresses: ClassVar = ("output",)

    model: str | None
    input: str
    output: str
    chat_template_kwargs: str
    counts: str | None
    weights: str
    max_pairs: int
    seed: int | None
    max_length: int

    def __post_init__(self):
        super().__post_init__()
        check_rule(self.weights)
        if not (self.weights in (AUTO, "uniform", FROM_COLUMNS) or self.weights.startswith(FROM_STORE)):
            raise UserError(
                f"config.weights={self.weights}: computed while training, and the page computes nothing; weigh with "
                f"launch.musc_token_weights, or choose {AUTO}, uniform, {FROM_COLUMNS} or {FROM_STORE}"
            )
        for name, least in (("max_pairs", 1), ("max_length", 2)):
            if getattr(self, name) < least:
                raise UserError(f"config.{name}: must be at least {least}, got {getattr(self, name)}")
        if self.model is None and self.weights != AUTO:
            raise UserError(f"config.weights={self.weights}: weights belong to tokens; give config.model too")


def write_report(config: ReportConfig) -> None:
    """Writes `config.output`, whole or not at all.

    Raises:
      UserError: anything the user can mend, naming file or row.
    """
    check_file_output(config.output)
    check_not_input(config.output, config.input)
    data = report_data(config)
    if jax.process_index() == 0:
        content = page(data)
        with replacing(config.output) as out:
            out.write(content)
        say(f"{config.output}: {len(data['pairs'])} pairs, {len(content) / 1e6:.1f} MB")


def report_data(config: ReportConfig) -> dict[str, Any]:
    """All that the page shows, ready for JSON.

    Raises:
      UserError: anything the user can mend.
    """
    total: list[int] = []

    def choose(number: int) -> Sequence[int]:
        total.append(number)
        return chosen_rows(number, config.max_pairs, config.seed)

    rule, tokens = None, None
    if config.model is None:
        pairs = read_pairs(config.input, choose, config.columns, config.max_dropped_share)
        pairs.check()
    else:
        encoded, tokens = _with_tokens(config, choose)
        pairs, rule = encoded, encoded.rule
    where = pairs.where
    say("\n".join(pairs.report))
    pairs.faults.say()
    records = [pair_record(row, own, where) for row, own in zip(pairs.rows, pairs.columns, strict=True)]
    for record, sides in zip(records, tokens or [{}] * len(records), strict=True):
        for side, found in sides.items():
            record[side] = found  # pieces instead of the text
    rules, scores = _fields(tokens or [])
    return {
        "file": where,
        "model": config.model,
        "rule": rule,
        "rules": rules,
        "scores": scores,
        "said": pairs.report,
        "total": total[0],
        "sampled": "evenly spaced" if config.seed is None else f"drawn with seed {config.seed}",
        "counts": _counts(config),
        "pairs": records,
    }


def _with_tokens(config: ReportConfig, choose: Choose):
    source = open_model(config.model or "")  # called where there is one
    tokenizer = load_tokenizer(source.directory, source.config.vocab_size, config.chat_template_kwargs)
    encoder = TextEncoder(tokenizer, config.max_length, end_token_ids(source.directory, tokenizer))
    pairs = load_pairs(config.input, encoder, config.weights, choose, config.columns, config.max_dropped_share)
    return pairs, token_records(pairs, tokenizer)


def chosen_rows(number: int, at_most: int, seed: int | None) -> list[int]:
    """Which of `number` rows are shown, ascending: all, else `at_most` evenly spaced ones or ones drawn by `seed`."""
    if number <= at_most:
        return list(range(number))
    if seed is None:
        return np.linspace(0, number - 1, at_most).round().astype(int).tolist()
    return sorted(draws.shuffled(range(number), seed, "report")[:at_most])


def _fields(tokens: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Weights, those that training would take first, and what else is known of the tokens, by name."""
    found = list(dict.fromkeys(f for sides in tokens for side in sides.values() for f in side["fields"]))
    order = [*found[:1], *(rule for rule in WEIGHING_RULES if rule in found[1:])]
    known = [f"{kind}_{context}" for kind in ("logprob", "entropy") for context in CONTEXTS]
    others = [f for f in found if f not in order]
    return order, sorted(others, key=lambda f: known.index(f) if f in known else len(known))


def _counts(config: ReportConfig) -> dict[str, Any] | None:
    path = config.counts or f"{config.input}.counts.json"
    if config.counts is None and not Path(path).is_file():
        return None
    try:
        (counts,) = map(json.loads, Path(path).read_text().splitlines())
        stages = [
            {"stage": str(s["stage"]), "rows": int(s["rows"]), "reasons": {r: int(n) for r, n in s["reasons"].items()}}
            for s in counts["stages"]
        ]
        return {"file": Path(path).name, **{k: int(counts[k]) for k in ("input", "pairs", "dropped")}, "stages": stages}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the tally that launch.musc_pairs writes; give config.counts another") from error


def page(data: Mapping[str, Any]) -> bytes:
    """The HTML file. Texts of the rows are in it only as JSON without `<`, `>` and `&`, which its script sets as text.

    The content security policy names the script and the style by their hashes and allows nothing else, no network
    either.
    """
    files = importlib.resources.files("musc_jax.report") / "page"
    script = '"use strict";\n' + "\n".join((files / name).read_text("utf-8") for name in _SCRIPTS)
    style = (files / "page.css").read_text("utf-8")
    parts = {
        "title": html.escape(f"{data['file']}: preference pairs"),
        "script_hash": _hash(script),
        "style_hash": _hash(style),
        "style": style,
        "script": script,
        "data": embedded(data),
    }
    template = (files / "page.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template).encode()


def embedded(data: Any) -> str:
    """JSON that may stand inside a <script> element, whatever texts are in it."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return re.sub("[\ud800-\udfff]", "\ufffd", text)  # half a surrogate pair, which UTF-8 has not


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
