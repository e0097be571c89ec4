"""The page as a browser shows it: made by the commands, opened in Chromium, steered by the address."""

import html
import json
import re

import pytest

from lm_jax.data.rows import write_jsonl
from tests import browser
from tests.e2e import common
from tests.e2e.common import arguments, fork

ATTACK = "<img src=x onerror=\"document.title='struck'\"></script><script>document.title='struck'</script>"
COUNTS = {
    "input": 15,
    "pairs": 12,
    "dropped": 3,
    "stages": [{"stage": "decompose", "rows": 15, "dropped": 3, "reasons": {"refusal": 2, "too_few_constraints": 1}}],
}


@pytest.fixture(scope="module")
def chromium():
    if browser.find() is None:
        pytest.skip(f"no browser: none of {', '.join(browser.NAMES)} is on the PATH")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pairs weighed by every rule, and their page."""
    path = tmp_path_factory.mktemp("place")
    model = common.make_model(path / "model")
    common.make_pairs(
        path / "pairs.jsonl",
        perturbed_prompt=lambda i: f"say that {i} cats",
        constraints=lambda i: ["say it", f"{i} cats sat", *["more"] * (i % 3)],
        perturbed_constraints=lambda i: ["say it", *["more"] * (i % 3)],
    )
    rows = common.read_rows(path / "pairs.jsonl")
    rows[4]["prompt"] += ATTACK
    rows[4]["chosen"] = "日本 is far"  # every byte of it a token
    rows[4]["constraints"][0] += ATTACK
    rows[4]["perturbed_constraints"][0] += ATTACK
    common.write_rows(path / "pairs.jsonl", rows)
    given = (f"model={model}", f"input={path / 'pairs.jsonl'}", f"output={path / 'weighed.jsonl'}")
    long = ("max_length=200", "batch.row_length=600", "batch.rows=2")  # the attacked prompt is long
    fork("musc_token_weights", *arguments("musc_token_weights", *given, *long, "rules=all", "keep_scores=true")).ok()
    write_jsonl(f"{path / 'weighed.jsonl'}.counts.json", [COUNTS])
    given = (f"model={model}", f"input={path / 'weighed.jsonl'}", f"output={path / 'page.html'}", "max_length=200")
    assert "12 pairs" in fork("report", *arguments("report", *given)).ok().stderr
    return path


def shown(page, view="", **options) -> str:
    """The page's HTML after its script ran, without a fault."""
    text = browser.dom(page, view, **options)
    root = re.search(r"<html[^>]*>", text)[0]
    assert 'data-ready="1"' in root and "data-error" not in root, root
    assert "struck" not in re.search(r"<title>(.*?)</title>", text)[1]
    return text


def ids(text: str) -> list[str]:
    return [html.unescape(i) for i in re.findall(r'<article class="pair"[^>]* aria-label="pair ([^"]*)"', text)]


def lengths(text: str, side: str) -> list[int]:
    """Of the responses that are filled in, in the order of the page."""
    return [int(n) for n in re.findall(rf'class="response {side}"><h3>\w+<small>(\d+) token', text)]


def test_tokens_are_tinted_and_texts_are_texts(chromium, place):
    text = shown(place / "page.html", "#rule=kl", height=12000)
    assert ids(text) == [f"pair-{i}" for i in range(12)]
    tinted = re.findall(r'<span class="t [lh]\d+"', text)
    assert len(tinted) > 100 and len({t[-3:] for t in tinted}) > 5
    assert "<img" not in text and html.escape(ATTACK.split("</")[0], quote=False) in text
    assert re.search(r"<del>[^<]*4 cats sat</del><em>dropped</em>", text)
    assert "日" in text and re.search(r'data-parts="3"[^>]*linear-gradient[^>]*>日<', text)  # a stripe for each byte
    assert "share of tokens" in text and "weight of a token (kl)" in text and "tokens of a response" in text
    assert "too few constraints" in text and "15 rows, 12 pairs (80%), 3 dropped" in text
    plain = shown(place / "page.html", "#rule=uniform", height=12000)
    assert not re.search(r'<span class="t [lh]\d+"', plain)


def test_search_narrows(chromium, place):
    assert ids(shown(place / "page.html", "#q=%227%20cats%22")) == ["pair-7"]
    text = shown(place / "page.html", "#q=PAIR-1")
    assert ids(text) == ["pair-1", "pair-10", "pair-11"] and "3 of 12 pairs" in text
    none = shown(place / "page.html", "#q=nowhere")
    assert ids(none) == [] and "No pair has all of these words" in none


def test_sort_sorts(chromium, place):
    up, down = (shown(place / "page.html", f"#sort=chosen{d}", height=12000) for d in ("", "&desc=1"))
    found = lengths(up, "chosen")
    assert len(found) == 12 and found == sorted(found) and len(set(found)) > 4
    assert lengths(down, "chosen") == sorted(found, reverse=True)
    assert ids(shown(place / "page.html", "#sort=id&desc=1"))[:3] == ["pair-11", "pair-10", "pair-9"]
    by_number = ids(shown(place / "page.html", "#sort=constraints"))
    assert [int(i.split("-")[1]) % 3 for i in by_number] == [0] * 4 + [1] * 4 + [2] * 4
    heavy = shown(place / "page.html", "#sort=mean&desc=1&rule=pmi", height=12000)
    means = [float(m) for m in re.findall(r"mean weight ([\d.]+)", heavy)]
    tokens = [n for pair in zip(lengths(heavy, "chosen"), lengths(heavy, "rejected"), strict=True) for n in pair]
    both = [(means[i] * tokens[i] + means[i + 1] * tokens[i + 1]) / sum(tokens[i : i + 2]) for i in range(0, 24, 2)]
    assert all(a >= b - 0.02 for a, b in zip(both, both[1:], strict=False)) and both[0] > both[-1]


def test_a_token_by_its_address(chromium, place):
    """What hovering shows: text, position, the weight by every rule, log-probs and entropies by context."""
    text = shown(place / "page.html", "#pair=pair-6&token=chosen.2&rule=pmi")
    tip = re.search(r'<div id="tip".*?</div><div id="heard"|<div id="tip".*?id="heard"', text, re.DOTALL)[0]
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    side = data["pairs"][6]["chosen"]
    assert f"token 2 of {side['tokens']}" in tip and "hidden" not in tip.split(">")[0]
    for rule in data["rules"]:
        assert rule.replace("_", " ") in tip
    assert [n for n in ("log p", "entropy", "full", "perturbed", "none") if n not in tip] == []
    assert 'class="current"><th scope="row">pmi' in tip


def test_plain_rows_and_no_model(chromium, place, tmp_path):
    path = common.make_pairs(tmp_path / "pairs.jsonl", number=1)
    fork("report", *arguments("report", f"input={path}", f"output={tmp_path}/a.html")).ok()
    text = shown(tmp_path / "a.html")
    assert ids(text) == ["pair-0"] and 'class="text tokens"' not in text and "No model was given" in text
    assert "0 cats sat" in text and "words of a response" in text
    model = f"model={place / 'model'}"
    fork("report", *arguments("report", model, f"input={path}", f"output={tmp_path}/b.html")).ok()
    text = shown(tmp_path / "b.html")
    assert 'class="text tokens"' in text and "The rows bring no weights" in text


def test_a_thousand_pairs(chromium, place, tmp_path):
    path = common.make_pairs(tmp_path / "pairs.jsonl", number=1200)
    given = (f"model={place / 'model'}", f"input={path}", f"output={tmp_path}/page.html", "max_pairs=1000")
    fork("report", *arguments("report", *given)).ok()
    text = shown(tmp_path / "page.html")
    assert len(ids(text)) == 1000 and "The page shows 1,000 of 1,200 pairs, evenly spaced" in text
    assert text.count('class="text tokens"') < 200  # those far below are filled when they come near
    assert ids(shown(tmp_path / "page.html", "#q=pair-1199")) == ["pair-1199"]


def test_refused(place, tmp_path):
    line = fork("report", *arguments("report", f"input={tmp_path}/no.jsonl", f"output={tmp_path}/x.html")).error()
    assert "no.jsonl" in line
    line = fork("report", *arguments("report", f"input={place}/pairs.jsonl", f"output={tmp_path}")).error()
    assert f"{tmp_path}: is a directory" in line
    given = (f"model={place / 'model'}", f"input={place}/weighed.jsonl", f"output={tmp_path}/x.html", "max_length=110")
    line = fork("report", *arguments("report", *given)).error()
    assert "were made for other texts, another tokenizer, config.max_length" in line
    before = (place / "pairs.jsonl").read_bytes()
    line = fork("report", *arguments("report", f"input={place}/pairs.jsonl", f"output={place}/pairs.jsonl")).error()
    assert "config.input itself" in line and (place / "pairs.jsonl").read_bytes() == before
    assert list(tmp_path.iterdir()) == []
