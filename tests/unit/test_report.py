"""What the report page holds: every pair, its tokens and numbers, counts, and no text that could become markup."""

import base64
import html.parser
import json
import re

import numpy as np
import pytest

from lm_jax.data.preference import PreferenceRow
from lm_jax.data.rows import write_jsonl
from lm_jax.data.score_store import ScoreStore
from lm_jax.data.text import TextEncoder
from lm_jax.data.tokenizers import load_tokenizer
from lm_jax.errors import UserError
from musc_jax.report.command import ReportConfig, chosen_rows, embedded, page, report_data, write_report
from musc_jax.report.pairs import constraint_records, packed, pair_record, prompt_parts
from musc_jax.training.examples import load_pairs
from musc_jax.weights.stored import COLUMN, key_digest, pair_fingerprint
from tests.checkpoints import make_checkpoint, make_tokenizer

ATTACKS = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!-- --!>",
    "]]>&lt;b&gt;",
    "\u2028\u2029",
]
MAX_LENGTH = 48


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    make_checkpoint(path, "llama")
    make_tokenizer(path)
    return str(path)


def rows(number=5, **columns):
    return [
        {
            "id": f"pair-{i}",
            "prompt": f"say that {i} cats sat and 日本 is far",
            "chosen": f"{i} cats sat on the 帽子",
            "rejected": f"{i} dogs",
            "constraints": ["say it", "cats", "far"],
            "perturbed_constraints": ["say it", "far"],
            "perturbed_prompt": f"say that {i} sat and 日本 is far",
            **{name: value(i) for name, value in columns.items()},
        }
        for i in range(number)
    ]


def config(path, **settings):
    default = {
        "model": None,
        "input": str(path),
        "output": str(path.parent / "page.html"),
        "counts": None,
        "chat_template_kwargs": "",
        "weights": "auto",
        "max_pairs": 200,
        "seed": None,
        "max_length": MAX_LENGTH,
    }
    return ReportConfig(**(default | settings))


def written(tmp_path, made):
    path = tmp_path / "pairs.jsonl"
    write_jsonl(str(path), made)
    return path


def numbers(field):
    low, step, text = field
    return low + step * np.frombuffer(base64.b64decode(text), "<u2")


class Scripts(html.parser.HTMLParser):
    """Every element of a document, and the text of its scripts, as a browser would cut them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self._inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.scripts[-1] += data


def read_page(path):
    found = Scripts(path.read_text("utf-8"))
    return found, json.loads(found.scripts[0])


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [False, True])
def test_every_text_comes_back_and_none_is_markup(tmp_path, model, tokens):
    made = rows(len(ATTACKS))
    for row, attack in zip(made, ATTACKS, strict=True):
        for name in ("id", "prompt", "chosen", "rejected", "perturbed_prompt"):
            row[name] += attack
        row["constraints"][1] += attack
    path = written(tmp_path, made)
    write_report(config(path, model=model if tokens else None, max_length=400))
    found, data = read_page(tmp_path / "page.html")
    plain, _ = read_page_of(tmp_path, rows(1))
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in plain.tags]  # the texts brought no element of their own
    assert len(data["pairs"]) == len(made)
    for pair, row in zip(data["pairs"], made, strict=True):
        assert pair["id"] == row["id"]
        assert "".join(text for what, text in pair["prompt"][0]["parts"] if what != 1) == row["prompt"]
        assert "".join(text for what, text in pair["prompt"][0]["parts"] if what != -1) == row["perturbed_prompt"]
        assert pair["constraints"][1] == {"text": row["constraints"][1], "kind": "dropped", "new": None}
        for side in ("chosen", "rejected"):
            shown = "".join(pair[side]["pieces"]) if tokens else pair[side]["text"]
            assert shown == row[side] + ("<|im_end|>" if tokens else "")


def read_page_of(tmp_path, made):
    directory = tmp_path / "other"
    directory.mkdir()
    write_report(config(written(directory, made)))
    return read_page(directory / "page.html")


def test_the_files_name_is_text(tmp_path):
    path = tmp_path / "<img src=x>&.jsonl"
    write_jsonl(str(path), rows(1))
    write_report(config(path))
    assert "<title>&lt;img src=x&gt;&amp;.jsonl: preference pairs</title>" in (tmp_path / "page.html").read_text()


def test_nothing_is_loaded_from_anywhere(tmp_path):
    path = written(tmp_path, rows())
    write_report(config(path))
    text = (tmp_path / "page.html").read_text("utf-8")
    found = Scripts(text)
    links = [a for _, attrs in found.tags for name, a in attrs.items() if name in ("src", "href", "action")]
    assert links == ["data:,"]  # an empty icon, so that no browser asks for one
    own = text.replace("http://www.w3.org/2000/svg", "")  # a name, no address
    assert not re.search(r"https?://|@import|url\(", own)
    policy = next(a["content"] for t, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy


def test_embedded_json_holds_no_sign_of_markup():
    value = {"a<b>&": [*ATTACKS, "\ud800 half"]}
    text = embedded(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"a<b>&": [*ATTACKS, "\ufffd half"]}
    text.encode()


def test_a_failed_report_leaves_the_old_page(tmp_path, monkeypatch):
    path = written(tmp_path, rows())
    (tmp_path / "page.html").write_text("old")
    monkeypatch.setattr("musc_jax.report.command.page", lambda data: "no bytes")
    with pytest.raises(TypeError):
        write_report(config(path))
    assert (tmp_path / "page.html").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "pairs.jsonl"]


# --- weights ---------------------------------------------------------------------------------------------------------


def test_tokens_and_numbers_are_those_of_training(tmp_path, model):
    """A store with several rules and scores: every number by its name, every token as `load_pairs` gives it."""
    path = written(tmp_path, rows())
    encoder = TextEncoder(load_tokenizer(model), MAX_LENGTH)
    pairs = load_pairs(str(path), encoder, "uniform")
    lengths = [len(s.response) for s in pairs.segments]
    rng = np.random.default_rng(0)
    fields = ("entropy_full", "kl", "calibrated_entropy", "logprob_full", "logprob_none")
    values = {f: [rng.uniform(-3 if "log" in f else 0, 2, n).astype(np.float32) for n in lengths] for f in fields}
    store = ScoreStore.create_or_open(str(tmp_path / "pairs.weights"), {"a": 1}, lengths, fields)
    store.write(range(len(lengths)), values)
    common = {"store": "pairs.weights", "key": key_digest(store.key), "rule": "kl"}
    made = rows()
    for i, row in enumerate(made):
        chosen, rejected = (s.response for s in pairs.segments[2 * i : 2 * i + 2])
        row[COLUMN] = common | {"row": i, "tokens": pair_fingerprint(row["prompt"], chosen, rejected)}
    data = report_data(config(written(tmp_path, made), model=model))
    assert data["rules"] == ["kl", "calibrated_entropy"]
    assert data["scores"] == ["logprob_full", "logprob_none", "entropy_full"]
    for i, pair in enumerate(data["pairs"]):
        for k, side in enumerate(("chosen", "rejected")):
            shown = pair[side]
            assert shown["tokens"] == lengths[2 * i + k]
            assert sum(dict(shown["parts"]).get(j, 1) for j in range(len(shown["pieces"]))) == shown["tokens"]
            assert shown["special"] == [len(shown["pieces"]) - 1]  # the end token
            for field in fields:
                np.testing.assert_allclose(numbers(shown["fields"][field]), values[field][2 * i + k], atol=1e-4)
    first = report_data(config(tmp_path / "pairs.jsonl", model=model, weights="store:calibrated_entropy"))
    assert first["rules"] == ["calibrated_entropy", "kl"]


def test_a_rows_own_scores(tmp_path, model):
    encoder = TextEncoder(load_tokenizer(model), MAX_LENGTH)
    lengths = [len(s.response) for s in load_pairs(str(written(tmp_path, rows())), encoder, "uniform").segments]
    made = rows(
        chosen_token_scores=lambda i: [0.5 + j for j in range(lengths[2 * i])],
        rejected_token_scores=lambda i: [0.25] * lengths[2 * i + 1],
    )
    data = report_data(config(written(tmp_path, made), model=model))
    assert (data["rule"], data["rules"], data["scores"]) == ("columns", ["columns"], [])
    np.testing.assert_allclose(
        numbers(data["pairs"][1]["chosen"]["fields"]["columns"]), made[1]["chosen_token_scores"], atol=1e-3
    )
    np.testing.assert_allclose(numbers(data["pairs"][1]["rejected"]["fields"]["columns"]), 0.25)


def test_without_weights_and_without_a_model(tmp_path, model):
    path = written(tmp_path, rows())
    with_model, without = (report_data(config(path, model=m)) for m in (model, None))
    assert with_model["rule"] == "uniform" and with_model["rules"] == with_model["scores"] == []
    assert with_model["pairs"][0]["chosen"]["fields"] == {} and "pieces" in with_model["pairs"][0]["chosen"]
    assert without["rule"] is None and without["pairs"][0]["chosen"] == {"text": "0 cats sat on the 帽子"}


def test_truncated_responses_say_so(tmp_path, model):
    path = written(tmp_path, rows())
    encoder = TextEncoder(load_tokenizer(model), 400)
    full = [len(s.response) for s in load_pairs(str(path), encoder, "uniform").segments]
    prompt = len(load_pairs(str(path), encoder, "uniform").segments[0].prompt)
    shown = report_data(config(path, model=model, max_length=prompt + 5))["pairs"][0]["chosen"]
    assert (shown["tokens"], shown["full_length"]) == (5, full[0]) and full[0] > 5
    assert shown["special"] == []  # the end token is beyond


@pytest.mark.parametrize("values", [[], [0.7], [1.2, 1.2], [0.0, 2.0, 1.1], [-30.0, -1e-4, 0.0]])
def test_packed_numbers(values):
    found = numbers(packed(np.array(values, np.float32)))
    np.testing.assert_allclose(found, values, atol=2e-5 * (max(values, default=0) - min(values, default=0) + 1))


# --- which pairs, and the tally --------------------------------------------------------------------------------------


def test_how_pairs_are_chosen(tmp_path):
    assert chosen_rows(5, 5, None) == chosen_rows(5, 9, 3) == [0, 1, 2, 3, 4]
    assert chosen_rows(101, 5, None) == [0, 25, 50, 75, 100] and chosen_rows(9, 1, None) == [0]
    drawn = chosen_rows(1000, 50, 3)
    assert drawn == sorted(set(drawn)) and len(drawn) == 50 and drawn != chosen_rows(1000, 50, 4)
    assert drawn == chosen_rows(1000, 50, 3) and all(0 <= i < 1000 for i in drawn)
    path = written(tmp_path, rows(30))
    data = report_data(config(path, max_pairs=4))
    assert [p["row"] for p in data["pairs"]] == [0, 10, 19, 29] and data["total"] == 30
    assert "30 rows read, 30 pairs kept; 4 of the pairs taken" in data["said"][0]


def test_identical_pairs_are_counted_and_rows_keep_their_numbers(tmp_path):
    made = rows(6)
    made[2]["rejected"] = made[2]["chosen"]
    data = report_data(config(written(tmp_path, made), max_pairs=5))
    assert [p["row"] for p in data["pairs"]] == [0, 1, 3, 4, 5]
    assert "6 rows read, 5 pairs kept, dropped: 1 chosen and rejected are identical" in data["said"][0]


def test_the_tally(tmp_path):
    path = written(tmp_path, rows())
    assert report_data(config(path))["counts"] is None
    stages = [{"stage": "decompose", "rows": 9, "dropped": 4, "reasons": {"refusal": 3, "<b>": 1}}]
    counts = {"input": 9, "pairs": 5, "dropped": 4, "stages": stages}
    write_jsonl(f"{path}.counts.json", [counts])
    shown = report_data(config(path))["counts"]
    assert shown["file"] == "pairs.jsonl.counts.json" and (shown["input"], shown["dropped"]) == (9, 4)
    assert shown["stages"] == [{"stage": "decompose", "rows": 9, "reasons": {"refusal": 3, "<b>": 1}}]
    for fault in ("[1]", '{"input": 3}', "no json", '{"input":1,"pairs":1,"dropped":0,"stages":[{"stage":"a"}]}'):
        (tmp_path / "counts").write_text(fault)
        with pytest.raises(UserError, match="not the tally that launch.musc_pairs writes"):
            report_data(config(path, counts=str(tmp_path / "counts")))


# --- one pair --------------------------------------------------------------------------------------------------------


def test_constraints_by_what_became_of_them():
    edits = [
        {"index": 0, "kind": "kept", "old": "a", "new": "a", "planned": "kept"},
        {"index": 1, "kind": "negated", "old": "b", "new": "not b", "planned": "negated"},
        {"index": 2, "kind": "dropped", "old": "c", "new": None, "planned": "negated"},
    ]
    columns = {"constraints": ["a", "b", "c"], "perturbed_constraints": ["a", "not b"], "perturbations": edits}
    kinds = [("a", "kept", "a"), ("b", "negated", "not b"), ("c", "dropped", None)]
    assert [tuple(c.values()) for c in constraint_records(columns, "row 0")] == kinds
    del columns["perturbations"]
    columns["perturbed_constraints"] = ["a", "x", "c"]
    assert [tuple(c.values()) for c in constraint_records(columns, "row 0")] == [
        ("a", "kept", None),
        ("b", "substituted", "x"),
        ("c", "kept", None),
    ]
    columns["perturbed_constraints"] = None
    assert [c["kind"] for c in constraint_records(columns, "row 0")] == ["kept"] * 3
    assert constraint_records({}, "row 0") == []
    for wrong in ({"constraints": "a"}, {"constraints": [1]}, {"perturbations": [{"old": 1}]}, {"perturbations": [3]}):
        with pytest.raises(UserError, match="row 0: (constraints|perturbations)"):
            constraint_records(wrong, "row 0")


def test_prompts_of_messages():
    full = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say a and say b now."}]
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in "ab")
    row = PreferenceRow(3, "x", full, chosen, rejected, None, None)
    record = pair_record(row, {"perturbed_prompt": "Say a now."}, "f.jsonl")  # the last user message alone
    assert record["prompt"][0] == {"role": "system", "parts": [(0, "Be brief.")]}
    assert [what for what, _ in record["prompt"][1]["parts"]] == [0, -1, 0]
    assert record["chosen"] == {"text": "a"} and record["perturbed"]
    assert not pair_record(row, {}, "f.jsonl")["perturbed"]
    assert prompt_parts("rain falls here", "1? 2? 3?")[0]["rewritten"] == ("rain falls here", "1? 2? 3?")
    with pytest.raises(UserError, match="f.jsonl row 3: perturbed_prompt"):
        pair_record(row, {"perturbed_prompt": [1]}, "f.jsonl")


# --- settings and colours --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"weights": "kl"}, "config.weights: unknown rule 'kl'"),
        ({"weights": "perplexity", "model": "m"}, "config.weights=perplexity: computed while training"),
        ({"weights": "columns"}, "config.weights=columns: weights belong to tokens; give config.model too"),
        ({"max_pairs": 0}, "config.max_pairs: must be at least 1, got 0"),
        ({"max_length": 1}, "config.max_length: must be at least 2"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, settings, says):
    with pytest.raises(UserError, match=re.escape(says)):
        config(tmp_path / "x.jsonl", **settings)


def style() -> str:
    data = {"file": "x", "pairs": []}
    return re.search(rb"<style>(.*?)</style>", page(data), re.DOTALL)[1].decode()


def luminance(rgb):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


THEMES = {"light": 0, "dark by the system": 1, "dark by choice": 2, "paper": 3}  # in the style's order


@pytest.mark.parametrize("theme", THEMES)
def test_text_is_legible_on_every_tint(theme):
    """WCAG's 4.5 : 1 at each of the twenty tints, and the tints grow apart from the sheet step by step."""
    blocks = re.findall(r"\{([^{}]*--sheet:[^{}]*)\}", style())
    assert len(blocks) == len(THEMES) and blocks[1].split() == blocks[2].split()
    found = dict(re.findall(r"--(\w+): (#\w{6}|#\w{3}|[\d.]+%)", blocks[THEMES[theme]]))
    found = {n: "#" + "".join(2 * c for c in v[1:]) if len(v) == 4 and v[0] == "#" else v for n, v in found.items()}
    colour = {n: np.array([int(v[i : i + 2], 16) / 255 for i in (1, 3, 5)]) for n, v in found.items() if v[0] == "#"}
    share = float(found["share"].rstrip("%")) / 100
    for end in ("low", "high"):
        last = 0
        for step in range(11):
            tint = colour["sheet"] + step * share * (colour[end] - colour["sheet"])
            a, b = sorted((luminance(tint), luminance(colour["ink"])))
            assert (b + 0.05) / (a + 0.05) >= 4.5, (end, step)
            distance = float(np.abs(tint - colour["sheet"]).sum())
            assert distance > last or step == 0
            last = distance
