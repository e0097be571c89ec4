r"""Rows and settings that nobody would write, by hypothesis: each gives an error of ours or a right result.

    python -m tests.any_rows 10000

tries that many examples, shared out among the kinds below, and prints how many of each were taken and refused. The unit
tests try a few hundred.
"""

import collections
import functools
import importlib
import json
import os
import re
import runpy
import sys
import tempfile
import types
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from lm_jax.config import from_config_dict, to_dict  # noqa: E402
from lm_jax.data.journal import rows_fingerprint  # noqa: E402
from lm_jax.data.preference import check_weight_lengths, preference_rows  # noqa: E402
from lm_jax.data.rows import read_rows, write_jsonl  # noqa: E402
from lm_jax.data.supervised import supervised_rows  # noqa: E402
from lm_jax.data.text import TextEncoder, checked  # noqa: E402
from lm_jax.data.tokenizers import load_tokenizer  # noqa: E402
from lm_jax.errors import UserError  # noqa: E402
from lm_jax.generation import command as generate  # noqa: E402
from lm_jax.models.decoder import check_compute  # noqa: E402
from lm_jax.sharding import make_mesh  # noqa: E402
from main_jax.rounds.candidates import Candidates  # noqa: E402
from main_jax.rounds.inputs import read_seeds, read_unlabelled  # noqa: E402
from musc_jax.pairs.constraints import parse_decomposition, parse_self_instructed  # noqa: E402
from musc_jax.pairs.tasks import read_tasks  # noqa: E402
from musc_jax.report.command import page  # noqa: E402
from musc_jax.report.pairs import pair_record  # noqa: E402
from tests.checkpoints import make_tokenizer  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
MAX_LENGTH = 64
END = "<|im_end|>"

# --- what may stand in a file ----------------------------------------------------------------------------------------

NASTY = ["", " ", "\0", "\ud800", "\udfff x", END, END * 2, "<|im_start|>", "\u2028", "\ufeff", "é", "e\u0301", "日本"]
NASTY += ["{{ 1 / 0 }}", "</script>", "../../etc/x", "\x1b[31m", "a" * 3000, "0", "NaN", "null", "**1.** a\n2) b"]
plain = st.one_of(st.text(min_size=1, max_size=12), st.sampled_from(["say it", "yes it is", "no", "日本 e\u0301"]))
texts = st.one_of(plain, st.text(max_size=30), st.sampled_from(NASTY))
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, -1, 10**400, 2**63, 1e308, -0.0]))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
roles = st.one_of(st.sampled_from(["user", "assistant", "system", "tool"]), texts)
scores = st.lists(st.floats(0, 2, width=32), max_size=12)


def message(role, text):
    return st.fixed_dictionaries({"role": st.just(role), "content": text})


def turns(text):
    """Messages, well-formed where `text` is `plain`."""
    well = st.tuples(message("user", text), message("assistant", text)).map(list)
    if text is plain:
        return well
    return st.one_of(well, st.lists(st.fixed_dictionaries({"role": roles, "content": texts}) | values, max_size=3))


def table(layouts, **extra):
    """Lists of rows, some as they should be, some nearly, some hardly.

    Args:
      layouts: strategy of a text -> the columns that each layout has, with their strategies.
      extra: columns that a row may have.
    """
    extra = {name: kind | values for name, kind in ({"id": texts | st.integers(), "zz": values} | extra).items()}
    well, ill = layouts(plain), layouts(texts)

    def rows(which):
        missing = extra.keys() - ill[which].keys()
        near = {name: st.one_of(kind, kind, kind, values) for name, kind in ill[which].items()}
        return st.one_of(
            st.lists(st.fixed_dictionaries(well[which]), min_size=1, max_size=3),
            st.lists(st.fixed_dictionaries(near, optional={n: extra[n] for n in missing}), min_size=1, max_size=3),
            st.lists(
                st.fixed_dictionaries({}, optional=extra | functools.reduce(dict.__or__, ill)), min_size=1, max_size=3
            ),
        )

    return st.integers(0, len(well) - 1).flatmap(rows)


PREFERENCE = table(
    lambda text: (
        {"prompt": text, "chosen": text, "rejected": text},
        {"prompt": turns(text).map(lambda t: t[:1]), "chosen": text, "rejected": text},
        {"prompt": turns(text), "chosen": turns(text), "rejected": turns(text)},
        {"chosen": turns(text), "rejected": turns(text)},
        {"instruction": text, "input": text, "chosen": text, "rejected": text},
        {
            "prompt": text,
            "chosen": text,
            "rejected": text,
            "chosen_token_scores": scores,
            "rejected_token_scores": scores,
        },
    ),
    chosen_token_scores=scores,
    constraints=st.lists(texts, max_size=4),
    perturbed_constraints=st.lists(texts, max_size=4),
    perturbed_prompt=texts | turns(texts),
    history=st.lists(st.lists(texts, min_size=2, max_size=2), max_size=2),
)
SUPERVISED = table(
    lambda text: (
        {"messages": turns(text)},
        {
            "conversations": turns(text).map(
                lambda t: [{"from": m["role"], "value": m["content"]} for m in t if "role" in m]
            )
        }
        if text is plain
        else {"conversations": st.lists(st.fixed_dictionaries({"from": roles, "value": texts}), max_size=3)},
        {"prompt": text, "response": text},
        {"prompt": turns(text).map(lambda t: t[:1]), "response": text},
        {"instruction": text, "output": text},
        {"prompt": text, "response": text, "weight": st.floats(0, 2), "source": st.sampled_from(["seed", "synthetic"])},
    ),
    weight=st.floats(0, 2),
    source=st.sampled_from(["seed", "synthetic"]),
    system=texts,
)
PROMPTS = table(lambda text: ({"prompt": text}, {"prompt": turns(text)}), max_new_tokens=st.integers(1, 8))
TASKS = table(lambda text: ({"prompt": text}, {"instruction": text, "input": text}))
UNLABELLED = table(lambda text: ({"id": text | st.integers(), "response": text},))
CANDIDATES = table(lambda text: ({"id": text | st.integers(), "response": text, "instruction": text},))

# --- what a right result is ------------------------------------------------------------------------------------------


@functools.cache
def encoder() -> TextEncoder:
    with tempfile.TemporaryDirectory() as directory:
        make_tokenizer(directory)
        return TextEncoder(load_tokenizer(directory), MAX_LENGTH)


def check_encoded(prompts, responses, encode) -> list:
    tokenizer = encoder()._tokenizer
    encoded = checked(encode(prompts, responses, [f"rows row {i}" for i in range(len(prompts))]))
    examples = [e if isinstance(e, list) else [e] for e in encoded]
    for prompt, response, e in ((p, r, e) for p, r, own in zip(prompts, responses, examples, strict=True) for e in own):
        assert len(e.prompt_ids) >= 1 <= len(e.response_ids) <= e.full_length
        assert len(e.prompt_ids) + len(e.response_ids) <= MAX_LENGTH
        assert e.truncated or e.full_length == len(e.response_ids)
        assert e.loss_mask is None or (len(e.loss_mask) == len(e.response_ids) and e.loss_mask.any())
        assert (e.prompt_ids >= 0).all() and (e.response_ids >= 0).all()
        assert max(e.prompt_ids.max(), e.response_ids.max()) < len(tokenizer)
        if isinstance(prompt, str) and not e.truncated:
            assert tokenizer.decode(e.prompt_ids) == prompt
            assert tokenizer.decode(e.response_ids) == response.removesuffix(END) + END
    return encoded


def preference(rows) -> None:
    data = preference_rows(rows, "rows")
    assert len(data.rows) + sum(data.dropped.values()) == len(rows)
    encode = encoder().encode_many
    sides = [check_encoded([r.prompt for r in data.rows], [getattr(r, s) for r in data.rows], encode) for s in SIDES]
    for row, *both in zip(data.rows, *sides, strict=True):
        check_weight_lengths(row, *both, "rows")


SIDES = ("chosen", "rejected")


def report(rows) -> None:
    data = preference_rows(rows, "rows")
    pairs = [pair_record(row, rows[row.row], f"rows row {row.row}") for row in data.rows]
    text = page({"file": "rows", "pairs": pairs}).decode()
    assert text.count("</script>") == text.count("<script")


def supervised(rows) -> None:
    data = supervised_rows(rows, "rows")
    assert len(data.rows) + sum(data.dropped.values()) == len(rows)
    assert all(row.weight > 0 and row.source in ("seed", "synthetic") for row in data.rows)
    check_encoded([r.prompt for r in data.rows], [r.response for r in data.rows], encoder().encode_conversations)


def in_a_file(read):
    """Of `read(path)`, a check of rows; what json writes, NaN and halves of surrogate pairs included, lies there."""

    def check(rows) -> None:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "rows.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            read(str(path))

    return check


def prompts(path: str) -> None:
    config = types.SimpleNamespace(input=path, max_new_tokens=8, columns="", max_dropped_share=0.0)
    rows, prompts, faults = generate._read(config)
    assert len({str(row["id"]) for row in rows}) == len(rows) == len(prompts) and not faults.rows
    rows_fingerprint(rows, "rows")
    ids = checked(encoder().encode_prompts([*prompts.values()], [f"rows row {i}" for i in prompts]))
    assert all(1 <= len(one) < MAX_LENGTH for one in ids)


def tasks(path: str) -> None:
    assert len({str(task.id) for task in read_tasks(path)[0]}) == len(read_rows(path))


def unlabelled(path: str) -> None:
    assert all(row["response"].strip() for row in read_unlabelled(path)[0])


def seeds(path: str) -> None:
    for seed in read_seeds(path)[0]:
        assert isinstance(seed.instruction, str) and isinstance(seed.response, str)


def candidates(path: str) -> None:
    assert sum(1 for _ in Candidates(path).rows()) == len(read_rows(path))


def round_trip(rows) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/rows.jsonl"
        write_jsonl(path, rows)
        assert read_rows(path) == rows


def any_bytes(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        for suffix in ("jsonl", "json", "parquet"):
            path = Path(directory) / f"rows.{suffix}"
            path.write_bytes(content)
            try:
                assert all(isinstance(row, dict) for row in read_rows(str(path)))
            except UserError:
                pass


def answers(text: str) -> None:
    """What a model says, which its readers take apart: a result or a reason to drop it."""
    assert parse_decomposition(text, "say it, in two words") is not None
    assert parse_self_instructed(text) is not None


# --- settings --------------------------------------------------------------------------------------------------------


@functools.cache
def launchers() -> dict[str, tuple]:
    """Name -> (config class, its values as the file has them)."""
    found = {}
    for file in sorted((ROOT / "launch").glob("*.py")):
        config = ROOT / "configs" / file.name
        if config.exists():
            read, _ = importlib.import_module(f"launch.{file.stem}").command()
            found[file.stem] = (read, _all_set(read, runpy.run_path(str(config))["get_config"]().to_dict()))
    return found


def _all_set(read, tree: dict) -> dict:
    """With a value for what a user has to give."""
    while True:
        try:
            from_config_dict(read, tree)
            return tree
        except UserError as error:
            unset = re.match(r"config\.(\w+): not set", str(error))
            if unset is None:
                return tree  # what else is wrong is settled among the values themselves
            tree[unset[1]] = "x.jsonl"


def leaves(tree: dict, prefix: tuple = ()):
    for key, value in tree.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, key))


def like(value):
    """Values of the same kind."""
    kinds = {bool: st.booleans(), int: st.integers(-1, 300), float: st.floats(-0.1, 1.1) | numbers, str: texts}
    return kinds.get(type(value), values)


@st.composite
def changed_settings(draw):
    name = draw(st.sampled_from(sorted(launchers())))
    tree = json.loads(json.dumps(launchers()[name][1]))
    for path in draw(st.lists(st.sampled_from(list(leaves(tree))), max_size=3)):
        *parents, key = path
        try:
            node = functools.reduce(lambda at, k: at[k], parents, tree)
            node[key] = draw(st.one_of(like(node[key]), like(node[key]), values))
        except (KeyError, TypeError, IndexError):
            continue  # a parent was changed before
    return name, tree


def config(example) -> None:
    name, tree = example
    cls = launchers()[name][0]
    made = from_config_dict(cls, tree)
    if hasattr(made, "compute"):
        check_compute(made.compute)
    if hasattr(made, "mesh"):
        make_mesh(made.mesh)
    assert from_config_dict(type(made), to_dict(made)) == made


KINDS = {
    "preference": (PREFERENCE, preference),
    "report": (PREFERENCE, report),
    "supervised": (SUPERVISED, supervised),
    "prompts": (PROMPTS, in_a_file(prompts)),
    "tasks": (TASKS, in_a_file(tasks)),
    "seeds": (SUPERVISED, in_a_file(seeds)),
    "unlabelled": (UNLABELLED, in_a_file(unlabelled)),
    "candidates": (CANDIDATES, in_a_file(candidates)),
    "round trip": (st.lists(st.dictionaries(texts, values, max_size=3), min_size=1, max_size=3), round_trip),
    "bytes": (st.binary(max_size=60) | st.lists(values).map(lambda v: json.dumps(v).encode()), any_bytes),
    "answers": (texts, answers),
    "config": (changed_settings(), config),
}

NEVER_REFUSED = ("bytes", "answers")  # refused inside, or with reasons that are no errors


def attempt(kind: str, examples: int) -> collections.Counter:
    """How many examples of `kind` were taken and how many refused, always the same ones.

    Raises:
      Exception: what neither our error nor a right result is, with the smallest example for it.
    """
    strategy, check = KINDS[kind]
    counts: collections.Counter = collections.Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def one(example):
        try:
            check(example)
            counts["taken"] += 1
        except UserError as error:
            assert str(error).strip() and "\n" not in str(error), repr(str(error))
            counts["refused"] += 1

    one()
    return counts


def main() -> None:
    examples = int(sys.argv[1])
    for kind in KINDS:
        print(f"{kind}: {dict(attempt(kind, -(-examples // len(KINDS))))}", flush=True)


if __name__ == "__main__":
    main()
