"""`launch.musc_token_weights`: preference rows -> a store of token weights, and the rows that point at it."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from lm_jax.checkpoints.buckets import is_remote
from lm_jax.checkpoints.runs import ModelSource, open_model, param_specs
from lm_jax.config import BatchConfig, ComputeConfig, MeshConfig
from lm_jax.console import Progress, say
from lm_jax.data.columns import RowKeys
from lm_jax.data.faults import write_faults
from lm_jax.data.messages import TOOLS, Text, split_arguments, with_arguments
from lm_jax.data.packing import Example, Segment, example_lengths
from lm_jax.data.preference import PreferenceRow
from lm_jax.data.rows import check_file_output, check_not_input, write_jsonl
from lm_jax.data.score_store import ScoreStore
from lm_jax.data.shares import encode_prompts
from lm_jax.data.text import TextEncoder, attempt
from lm_jax.data.tokenizers import end_token_ids, load_tokenizer, tokenizer_fingerprint
from lm_jax.distributed.processes import barrier, everywhere, process_0_first
from lm_jax.errors import UserError
from lm_jax.models.decoder import check_compute
from lm_jax.scoring.contexts import Contrast, contrast
from lm_jax.sharding import make_mesh
from lm_jax.strict_json import dumps
from musc_jax.training.examples import Pairs, load_pairs, perturbed_prompt
from musc_jax.weights.rules import (
    CHOSEN,
    FULL,
    MAX_WEIGHT,
    NONE,
    PERTURBED,
    REJECTED,
    WEIGHING_RULES,
    ResponseScores,
    contexts_of,
    parse_rules,
)
from musc_jax.weights.stored import COLUMN, key_digest, pair_fingerprint, store_as_written

_SIDES = (CHOSEN, REJECTED)
_SUMMED = 4096  # responses read together for the table at the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeighConfig(RowKeys):
    """`configs/musc_token_weights.py` says what each key is for."""

    addresses: ClassVar = ("output",)

    model: str
    input: str
    output: str
    store: str | None = None
    chat_template_kwargs: str = ""
    rules: str = "calibrated_entropy"
    keep_scores: bool = False
    seed: int = 0
    dtype: str = "float32"
    max_length: int = 2048
    batch: BatchConfig = BatchConfig(row_length=6144)
    mesh: MeshConfig = MeshConfig()
    compute: ComputeConfig = ComputeConfig()

    def __post_init__(self):
        super().__post_init__()
        parse_rules(self.rules)
        if self.max_length < 2:
            raise UserError(f"config.max_length: must be at least 2, got {self.max_length}")


def weigh_rows(config: WeighConfig) -> None:
    """Weighs every response token of every pair and writes `config.output`, whole or not at all.

    The store fills batch by batch and may be read meanwhile; the same command goes on after an interruption.

    Raises:
      UserError: anything the user can mend, naming file or row.
    """
    rules = parse_rules(config.rules)
    mesh = make_mesh(config.mesh)
    check_compute(config.compute)
    check_file_output(config.output)
    check_not_input(config.output, config.input)
    source = open_model(config.model)
    param_specs(source.config, mesh)
    tokenizer = load_tokenizer(source.directory, source.config.vocab_size, config.chat_template_kwargs)
    encoder = TextEncoder(tokenizer, config.max_length, end_token_ids(source.directory, tokenizer))
    pairs = load_pairs(config.input, encoder, "uniform", None, config.columns, config.max_dropped_share, last=False)
    contexts = contexts_of(rules)

    def too_long(two: Sequence[Example]) -> str | None:
        longest = int(example_lengths(two).max())
        if longest <= config.batch.row_length:
            return None
        return (
            f"a response under {len(contexts)} prompts takes {longest} tokens and a row holds "
            f"{config.batch.row_length}; raise config.batch.row_length or lower config.max_length"
        )

    pairs, perturbed, examples = in_contexts(pairs, rules, encoder, tokenizer, too_long)
    say("\n".join(pairs.report))
    dropped = f"{config.output}.dropped.jsonl"
    pairs.faults.say(dropped)
    same = sum(row.prompt == other for row, other in zip(pairs.rows, perturbed or [], strict=perturbed is not None))
    if same:
        say(
            f"{pairs.where}: {same} of {len(pairs)} perturbed prompts equal their prompt; nothing tells these rows' "
            "tokens apart (every ratio is 1 and every divergence 0)"
        )

    key = store_key(pairs, perturbed, rules, config, source, tokenizer)
    fields = (*rules, *(_score_fields(contexts) if config.keep_scores else ()))
    where = config.store or f"{config.output.removesuffix('.jsonl')}.weights"
    lengths = [len(e[0].response) for e in examples]
    store = process_0_first(lambda: ScoreStore.create_or_open(where, key, lengths, fields), "the store of weights")
    _fill(store, pairs, examples, contexts, rules, config, source, mesh)
    if jax.process_index() == 0:
        write_faults(dropped, [pairs.faults])
        write_jsonl(config.output, _rows(pairs, store, rules[0], config.output))
        tokens = int(store.lengths.sum())
        report: dict[str, Any] = {"rows": len(pairs), "faulty": len(pairs.faults.rows), "tokens": tokens}
        report |= {"same_prompts": same, "store": store.path}
        report |= {"output": config.output, "weights": _summary(store, rules)}
        if not is_remote(store.path):
            report["store_bytes_per_token"] = round(_bytes(store.path) / max(tokens, 1) / len(fields), 3)
        print(dumps(report))


def in_contexts(
    pairs: Pairs,
    rules: Sequence[str],
    encoder: TextEncoder,
    tokenizer: Any,
    fault: Callable[[Sequence[Example]], str | None],
) -> tuple[Pairs, list[Text] | None, list[Example]]:
    """(the pairs, their perturbed prompts where a rule reads them, each response under each context: one segment a
    context, and 2 responses a pair), without the pairs that have a fault, which are checked here.

    The response's tokens are those that training sees, cut where the full instruction and it reach max_length, under
    every context: so weights line up, and under a longer instruction the sequence may be longer than max_length.

    Args:
      pairs: as `load_pairs` gives them while more is looked at.
      fault: what is wrong with the two examples of a pair, if anything.

    Raises:
      UserError: as `PairRows.check`.
    """
    contexts, perturbed, prompts = contexts_of(rules), None, {}
    if PERTURBED in contexts:
        names = [f"{pairs.name(i)} (perturbed_prompt)" for i in range(len(pairs))]
        rows = zip(pairs.rows, pairs.columns, strict=True)
        found = [attempt(perturbed_of, row, own, rules, pairs.name(i)) for i, (row, own) in enumerate(rows)]
        pairs, (perturbed, names) = pairs.sound(pairs.faults.sound(_numbers(pairs), found), names)
        ids = pairs.faults.sound(_numbers(pairs), encode_prompts(encoder, perturbed, names))
        pairs, (perturbed, prompts[PERTURBED]) = pairs.sound(perturbed, ids)
    prompts[FULL] = [s.prompt for s in pairs.segments[::2]]
    if NONE in contexts:
        empty = [_without_instruction(row.prompt) for row in pairs.rows]
        each = {repr(text): no_prompt(encoder, tokenizer, text) for text in empty}
        prompts[NONE] = [each[repr(text)] for text in empty]
    examples = [
        tuple(Segment(prompts[context][i // 2], segment.response) for context in contexts)
        for i, segment in enumerate(pairs.segments)
    ]
    both = list(zip(examples[::2], examples[1::2], strict=True))
    for i, two in enumerate(both):
        if said := fault(two):
            pairs.faults.add(pairs.rows[i].row, f"{pairs.name(i)}: {said}")
    pairs, (both, *others) = pairs.sound(both, *([] if perturbed is None else [perturbed]))
    pairs.check()
    return pairs, others[0] if others else None, [example for two in both for example in two]


def _numbers(pairs: Pairs) -> list[int]:
    return [row.row for row in pairs.rows]


def perturbed_of(row: PreferenceRow, columns: Mapping[str, Any], rules: Sequence[str], name: str) -> Text:
    """The row's `perturbed_prompt`, in its prompt's form: beside messages a string is the last user message.

    Raises:
      UserError: missing, or of another form.
    """
    value = columns.get("perturbed_prompt")
    if value is None:
        needing = next(rule for rule in rules if PERTURBED in WEIGHING_RULES[rule].contexts)
        without = ", ".join(key for key, rule in WEIGHING_RULES.items() if PERTURBED not in rule.contexts)
        raise UserError(
            f"{name}: column 'perturbed_prompt' is missing, which the rule {needing} contrasts the prompt "
            f"with; add it, or choose a rule among {without}"
        )
    return perturbed_prompt(row.prompt, value, name)


def _without_instruction(prompt: Text) -> Text:
    """An empty one in the prompt's form, with what its chat template takes besides; not the functions to call."""
    if isinstance(prompt, str):
        return ""
    arguments = {name: value for name, value in split_arguments(prompt)[0].items() if name != TOOLS}
    return with_arguments([{"role": "user", "content": ""}], arguments)


def no_prompt(encoder: TextEncoder, tokenizer: Any, empty: Text) -> np.ndarray:
    """Token ids of no instruction: int32 [P], P >= 1.

    Args:
      empty: messages: one empty user message, for the chat template. Raw text: the tokenizer's leading special tokens
        stand for it; where it has none, its end token, which is what stands between texts in pretraining.
    """
    lead = tokenizer("", add_special_tokens=True)["input_ids"]
    if isinstance(empty, str) and not [i for i in lead if i != tokenizer.eos_token_id]:
        return np.array([tokenizer.eos_token_id], np.int32)
    return encoder.encode_prompt(empty, "the empty instruction")


def store_key(
    pairs: Pairs,
    perturbed: Sequence[Text] | None,
    rules: Sequence[str],
    config: WeighConfig,
    source: ModelSource,
    tokenizer: Any,
) -> dict[str, Any]:
    """What the weights depend on. Of perturbed prompts text and tokenizer, with its template: they settle the ids."""
    digest = hashlib.sha256()
    for i in range(len(pairs)):
        digest.update(_fingerprint(pairs, i).encode())
    key: dict[str, Any] = {
        "rules": list(rules),
        "tokens": digest.hexdigest(),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "model": everywhere(lambda: source.fingerprint, "the model's fingerprint"),
        "dtype": config.compute.dtype,
    }
    if perturbed is not None:
        key["perturbed"] = hashlib.sha256(json.dumps(perturbed, sort_keys=True).encode()).hexdigest()
    if "shuffled" in rules:
        ids = json.dumps([row.id for row in pairs.rows]).encode()
        key |= {"seed": config.seed, "ids": hashlib.sha256(ids).hexdigest()}
    return key


def response_scores(
    scores: Contrast, contexts: Sequence[str], side: str, draw: tuple[int | str, ...] = ()
) -> ResponseScores:
    """The pass's numbers by their names."""
    kl, reverse_kl = (None, None) if scores.divergences is None else scores.divergences
    return ResponseScores(
        dict(zip(contexts, scores.logprobs, strict=True)),
        dict(zip(contexts, scores.entropies, strict=True)),
        kl,
        reverse_kl,
        side == CHOSEN,
        draw=draw,
    )


def _fill(store, pairs, examples, contexts, rules, config, source, mesh) -> None:
    """Weighs what the store lacks, batch by batch."""
    missing = np.zeros(len(examples), bool)
    missing[everywhere(lambda: store.missing().tolist())] = True
    if missing.any():
        done = len(examples) - int(missing.sum())
        progress = Progress(len(examples), done, "response")
        divergences = any(WEIGHING_RULES[rule].divergences for rule in rules)
        params = source.load_params(mesh, "float32")
        for batch in contrast(
            params, examples, missing, source.config, config.compute, config.batch, mesh, divergences
        ):
            rows: list[int] = []
            values: dict[str, list[np.ndarray]] = {field: [] for field in store.fields}
            for item, scores in batch:
                name = f"{pairs.name(item // 2)} ({_SIDES[item % 2]})"
                draw = (config.seed, pairs.rows[item // 2].id)
                weights = _weights(response_scores(scores, contexts, _SIDES[item % 2], draw), rules, name)
                if config.keep_scores:
                    weights |= _raw_scores(scores, contexts)
                rows.append(item)
                for field, array in weights.items():
                    values[field].append(array)
            if jax.process_index() == 0:
                store.write(rows, values)
            done += int(missing[rows].sum())
            progress.update(done, {})
        progress.close()
    barrier("the end of weighing")


def _weights(scores: ResponseScores, rules: Sequence[str], name: str) -> dict[str, np.ndarray]:
    for kind, by_context in (("log-prob", scores.logprobs), ("entropy", scores.entropies)):
        for context, values in by_context.items():
            if not (finite := np.isfinite(values)).all():
                at = int(np.argmin(finite))
                raise UserError(
                    f"{name}: the {kind} of token {at} under the {context} prompt is {values[at]}; look at the row, "
                    "compute in float32 if the model overflows, and check the model's weights if every row does"
                )
    return {rule: WEIGHING_RULES[rule].weigh(scores) for rule in rules}


def _score_fields(contexts: Sequence[str]) -> list[str]:
    return [f"{kind}_{context}" for kind in ("logprob", "entropy") for context in contexts]


def _raw_scores(scores: Contrast, contexts: Sequence[str]) -> dict[str, np.ndarray]:
    return dict(zip(_score_fields(contexts), [*scores.logprobs, *scores.entropies], strict=True))


def _rows(pairs: Pairs, store: ScoreStore, rule: str, output: str) -> Iterator[Mapping[str, Any]]:
    """The input's rows with a pointer each."""
    common = {"store": store_as_written(store.path, output), "key": key_digest(store.key), "rule": rule}
    for i, columns in enumerate(pairs.columns):
        yield {**columns, COLUMN: common | {"row": i, "tokens": _fingerprint(pairs, i)}}


def _fingerprint(pairs: Pairs, i: int) -> str:
    chosen, rejected = pairs.segments[2 * i : 2 * i + 2]
    return pair_fingerprint(chosen.prompt, chosen.response, rejected.response)


def _summary(store: ScoreStore, rules: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of each rule: the mean weight, and the shares of tokens at either end."""
    sums = {rule: np.zeros(3) for rule in rules}
    for start in range(0, len(store.lengths), _SUMMED):
        values = store.read(np.arange(start, min(start + _SUMMED, len(store.lengths))))
        for rule in rules:
            flat = np.concatenate(values[rule]).astype(np.float64)
            sums[rule] += flat.sum(), (flat == 0).sum(), (flat == MAX_WEIGHT).sum()
    total = max(int(store.lengths.sum()), 1)
    return {r: dict(zip(("mean", "at_0", "at_2"), (s / total).round(4).tolist(), strict=True)) for r, s in sums.items()}


def _bytes(directory: str) -> int:
    return sum(p.stat().st_size for p in Path(directory).expanduser().rglob("*") if p.is_file())
