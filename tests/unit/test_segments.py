"""Documents cut into response-like segments, by hand-made documents for each rule and on real web text."""

import collections
import dataclasses
import json
import random
import runpy

import pytest

from lm_jax.config import from_config_dict
from lm_jax.data.similarity import near_duplicates, tokens
from lm_jax.errors import UserError
from main_jax.texts.command import PrepareConfig, prepare, table
from main_jax.texts.segments import LineFault, SegmentConfig, SegmentFault, cut, line_fault
from tests.conftest import ROOT


def whole_config(**changes) -> PrepareConfig:
    config = runpy.run_path(str(ROOT / "configs" / "main_prepare.py"))["get_config"]()
    config.update({"input": "in.jsonl", "output": "out.jsonl", **changes})
    return from_config_dict(PrepareConfig, config.to_dict())


CONFIG = whole_config().segments
SHORT = dataclasses.replace(CONFIG, min_words=10, max_words=40)
RAIN = "Rain is the water that falls to the ground from the clouds when the drops in them have grown heavy."
SNOW = "Snow is made of the small crystals of ice that form in a cloud which is colder than the air below it."
HAIL = "Hail is made in the storms of the summer, where the wind takes the drops up to the cold more than once."
FOG = "Fog is a cloud that lies on the ground and is made when the air of the night is cooled by the earth."


def cut_all(text, config=SHORT, **options):
    return list(cut(text, config, **options))


def kept(text, config=SHORT, **options):
    return [piece.text for piece in cut_all(text, config, **options) if piece.fault is None]


def dropped_lines(text, config=SHORT, **options):
    counts = collections.Counter()
    cut_all(text, config, dropped=counts, **options)
    return dict(counts)


def test_a_document_that_fits_is_one_segment():
    assert kept(f"{RAIN}\n{SNOW}", dataclasses.replace(SHORT, max_words=60)) == [f"{RAIN}\n{SNOW}"]


def test_long_documents_are_cut_at_lines_and_sentences():
    pieces = cut_all(f"{RAIN}\n{SNOW}\n{HAIL}\n{FOG}")
    assert [p.text for p in pieces] == [RAIN, SNOW, HAIL, FOG]  # 19 to 22 words: two do not fit into 40
    assert [p.fault for p in pieces] == [None, *[SegmentFault.DANGLING] * 3]  # in the middle of a text
    # One line of four sentences is cut between them
    assert [p.text for p in cut_all(f"{RAIN} {SNOW} {HAIL} {FOG}")] == [RAIN, SNOW, HAIL, FOG]


def test_sections_begin_segments():
    text = f"{RAIN}\nWhere snow comes from\n{SNOW}\nHail\n{HAIL}"
    assert kept(text) == [RAIN, f"Where snow comes from\n{SNOW}", f"Hail\n{HAIL}"]
    wide = dataclasses.replace(SHORT, max_words=200)
    assert kept(text, wide) == [RAIN, f"Where snow comes from\n{SNOW}", f"Hail\n{HAIL}"]
    short_intro = f"Rain and snow.\nWhere snow comes from\n{SNOW}"  # too short to stand alone
    assert kept(short_intro, wide) == [short_intro]


def test_lists_stay_with_what_announces_them():
    steps = [f"{i}. Put the cup of water on the table and look at it for a while" for i in (1, 2)]
    text = "\n".join(["To see the rain form, do the following at home:", *steps])
    config = dataclasses.replace(SHORT, max_words=45)
    assert kept(text, config) == [text]
    more = [*steps, *[s.replace("1.", "3.").replace("2.", "4.") for s in steps]]
    pieces = cut_all("\n".join(["To see the rain form, do the following at home:", *more]), config)
    assert [len(p.text.split("\n")) for p in pieces] == [3, 2]  # cut between items, never inside of one


@pytest.mark.parametrize("mark", ["- ", "* ", "• ", "1) ", "a. ", "2 ", "1/2 ", "Step 3: "])
def test_items_need_no_full_stop(mark):
    text = f"{RAIN}\n{mark}the water of the clouds and of the sea is in the end all of one kind"
    assert kept(text) == [text]


def test_abbreviations_end_no_sentence():
    first = (
        "Dr. A. Smith of the U.S. said on the day that the rain of the year was not more than it had been, e.g. in May."
    )
    assert [p.text for p in cut_all(f"{first} {SNOW}")] == [first, SNOW]


def test_other_scripts_end_sentences_too():
    words = "雨是从云中落下的水。云中的水滴变重时，雨就落到地上。"
    config = dataclasses.replace(SHORT, stop_words=("的", "是", "中"), min_words=5, max_words=25)
    pieces = [p.text for p in cut_all(words * 3, config)]
    assert "".join(pieces) == words * 3 or "".join(pieces).replace(" ", "") == words * 3
    assert all(p.endswith("。") and len(tokens(p)) <= 25 for p in pieces)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (RAIN, None),
        ("Where snow comes from", None),
        ("- two cups of flour", None),
        ("NASA", None),
        ("WELCOME TO THE BEST SHOP IN TOWN", LineFault.UPPER_CASE),
        ("12/05/2018 | 17:45 | $4.99 (3)", LineFault.SYMBOLS),
        ("* * *", LineFault.SYMBOLS),
        ("See http://example.org/rain for the rest.", LineFault.LINKS),
        ("Write to rain@example.org.", LineFault.LINKS),
        ("Posted by Ann on Monday", LineFault.BOILERPLATE),
        ("Copyright 2018 The Rain Company.", LineFault.BOILERPLATE),
        ("3 comments", LineFault.BOILERPLATE),
        ("Click here to read more.", LineFault.BOILERPLATE),
        ("Next: why it snows", LineFault.BOILERPLATE),
        ("We use cookies to give you the best experience.", LineFault.BOILERPLATE),
        ("Share this", LineFault.BOILERPLATE),
        ("The rain \ufffds falling on the roof.", LineFault.GARBLED),
        ("Sateella vesi putoaa maahan ja ilma on nyt niin kylmä ettei se voi olla enää pilvi", LineFault.LANGUAGE),
    ],
)  # fmt: skip
def test_lines(line, fault):
    assert line_fault(line, CONFIG) == fault


def test_a_long_paragraph_may_speak_of_cookies():
    line = f"{RAIN} People who bake cookies look at the sky for the rain. {SNOW} {HAIL}"
    assert line_fault(line, CONFIG) is None and line_fault("Bake cookies.", CONFIG) is LineFault.BOILERPLATE


def test_nothing_is_joined_over_a_dropped_line():
    text = f"{RAIN}\nClick here to read more.\nSnow\n{SNOW}"
    wide = dataclasses.replace(SHORT, max_words=200)
    assert kept(text, wide) == [RAIN, f"Snow\n{SNOW}"]
    assert dropped_lines(text, wide) == {"boilerplate": 1}


def test_cut_sentences_and_lonely_headings_go():
    wide = dataclasses.replace(SHORT, max_words=200)
    assert kept(f"{RAIN} {SNOW[:40]}", wide) == [RAIN]  # a document that ends in the middle of a sentence
    assert kept(f"Products\nPlaces\nAbout\n{RAIN}", wide) == [f"About\n{RAIN}"]
    assert dropped_lines(f"Products\nPlaces\nAbout\n{RAIN}", wide) == {"fragment": 2}
    assert kept(f"{RAIN}\nWhy it snows", wide) == [RAIN]  # the title of the next article
    assert kept("a line of words that is far too long to be a heading and has no end\n" + RAIN, wide) == [RAIN]


def test_repeated_lines_go():
    wide = dataclasses.replace(SHORT, max_words=200)
    assert dropped_lines(f"{RAIN}\n{SNOW}\n{RAIN.upper().lower()}", wide) == {"repeated": 1}
    assert kept(f"{RAIN}\n{SNOW}", wide, repeated=lambda key: key.startswith("snow is made")) == [RAIN]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (RAIN, None),
        ("It rains when the drops in the clouds are so heavy that they fall to the ground.", None),
        ("Rain is the water of the clouds and air.", SegmentFault.TOO_SHORT),
        ("Regen rain weather forecast umbrella cheap best online price umbrella store.", SegmentFault.LANGUAGE),
        ("However, the rain is not the only thing that falls from the clouds to the ground.", SegmentFault.DANGLING),
        ("of the clouds, and this is what the rain is and why it is so good.", SegmentFault.DANGLING),
        ("The map below shows where the rain is and where it will be in the morning.", SegmentFault.DANGLING),
        ("The rain is what we offer to you and to all of the people in the town.", SegmentFault.PROMOTION),
        ("For the best of the rain in the town, give us a call at the number on the door.", SegmentFault.PROMOTION),
        ("Thanks for the post, it is just what I was looking for in the rain.", SegmentFault.CONVERSATION),
        ("The rain is here! It is on the roof! It is in the house! Who will stop it?", SegmentFault.CONVERSATION),
        ("The rain was so good for my garden and I was in it with my dog all day.", SegmentFault.PERSONAL),
        ("The rain of 2018 was 12 and that of 2017 was 14, of 2016 it was 11.", SegmentFault.NUMBERS),
    ],
)
def test_segments_that_are_no_answers(text, fault):
    (piece,) = cut_all(text, dataclasses.replace(SHORT, max_symbols=0.5))
    assert piece.text == text and piece.fault == fault


def test_entities_and_odd_line_ends():
    text = RAIN.replace("the ground", "&quot;the ground&quot;") + "\r\n" + SNOW + "\r" + HAIL
    (piece,) = cut_all(text, dataclasses.replace(SHORT, max_words=200))
    assert piece.text == "\n".join([RAIN.replace("the ground", '"the ground"'), SNOW, HAIL])


def test_no_text_breaks_it():
    draw = random.Random(0)
    letters = "aA .!?\n\r\t-*1:“”é雨。\ufffd\u2028&;#'\""
    for _ in range(300):
        text = "".join(draw.choice(letters) for _ in range(draw.randrange(400)))
        for piece in cut_all(text, dataclasses.replace(SHORT, min_words=1)):
            assert piece.text.strip() and "\r" not in piece.text
    assert cut_all("") == cut_all(" \n \n") == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"min_words": 0}, "config.segments.min_words=0: must lie between 1 and config.segments.max_words=300"),
        ({"min_words": 301}, "config.segments.min_words=301"),
        ({"max_upper": 1.5}, "config.segments.max_upper=1.5: must lie between 0 and 1"),
    ],
)
def test_faulty_settings(change, says):
    with pytest.raises(UserError) as caught:
        SegmentConfig(**{**dataclasses.asdict(CONFIG), **change})
    assert says in str(caught.value)


def documents(tmp_path, rows, name="in.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared(tmp_path, input, **changes):
    config = whole_config(input=str(input), output=str(tmp_path / "out.jsonl"), **changes)
    prepare(dataclasses.replace(config, segments=dataclasses.replace(SHORT, max_words=200)))
    return read(tmp_path / "out.jsonl"), read(tmp_path / "out.jsonl.dropped.jsonl")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_in_rows_out(tmp_path, capsys):
    furniture = "The rain shop is a part of the weather house"
    rows = [
        {"id": "x", "text": f"{RAIN}\n{furniture}", "more": 1},
        {"text": f"{SNOW}\n{furniture}"},
        {"id": 5, "text": f"{RAIN.replace('heavy', 'large')}\n{furniture}"},
        {"id": "y", "text": f"However, {RAIN}"},
    ]
    kept, dropped = prepared(tmp_path, documents(tmp_path, rows))
    assert kept == [
        {"id": "x/0", "response": RAIN, "document": "x"},
        {"id": "1/0", "response": SNOW, "document": 1},
    ]
    assert [(row["id"], row["reason"]) for row in dropped] == [("y/0", "dangling"), ("5/0", "near_duplicate")]
    assert dropped[1]["of"] == "x/0" and dropped[1]["text"] == RAIN.replace("heavy", "large")
    (counts,) = read(tmp_path / "out.jsonl.counts.json")
    assert counts["lines_dropped"] == {"repeated": 3} and counts["segments"] == 4 and counts["kept"] == 2
    assert counts["segments_dropped"] == {"dangling": 1, "near_duplicate": 1}
    assert counts["documents"] == 4 and counts["documents_used"] == 2
    assert capsys.readouterr().out.strip() == table(counts)
    kept, _ = prepared(tmp_path, documents(tmp_path, rows), near_duplicate=0.0)
    assert [row["id"] for row in kept] == ["x/0", "1/0", "5/0"]


def test_plain_text(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "b.txt").write_text(SNOW)
    (tmp_path / "texts" / "a.txt").write_text(f"\ufeff{RAIN}\n")
    kept, _ = prepared(tmp_path, tmp_path / "texts")
    assert kept == [
        {"id": "a/0", "response": RAIN, "document": "a"},
        {"id": "b/0", "response": SNOW, "document": "b"},
    ]
    kept, _ = prepared(tmp_path, tmp_path / "texts" / "b.txt")
    assert [row["id"] for row in kept] == ["b/0"]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"text": RAIN}, {"txt": RAIN}], "in.jsonl row 1: column 'text' is missing"),
        ([{"text": 1}], "in.jsonl row 0: text must be a text, got int"),
        ([{"id": 1, "text": RAIN}, {"text": SNOW}], "in.jsonl row 1: another row has the same id 1"),
        ([{"id": "", "text": RAIN}], "in.jsonl row 0: id must be a string or a whole number"),
        ([], "the file is empty"),
        ([{"text": "Rain."}], "no segment is left of 0; "),
    ],
)
def test_faulty_documents(tmp_path, rows, says):
    with pytest.raises(UserError) as caught:
        prepared(tmp_path, documents(tmp_path, rows))
    assert says in str(caught.value) and not (tmp_path / "out.jsonl").exists()


def test_real_web_text(tmp_path, shared_data):
    """The rules' promises, kept on real text; twice the same."""
    source = shared_data / "c4_demo.json"
    config = whole_config(input=str(source), output=str(tmp_path / "out.jsonl"))
    prepare(config)
    first = (tmp_path / "out.jsonl").read_bytes()
    rows, dropped = read(tmp_path / "out.jsonl"), read(tmp_path / "out.jsonl.dropped.jsonl")
    (counts,) = read(tmp_path / "out.jsonl.counts.json")
    texts = [row["text"] for row in json.loads(source.read_text())]
    assert counts["documents"] == len(texts) == 300 and counts["segments"] == len(rows) + len(dropped)
    assert 90 <= len(rows) <= 160 and set(counts["segments_dropped"]) <= set(SegmentFault)
    for row in rows:
        words = tokens(row["response"])
        assert 40 <= len(words) <= 300 and row["response"][0] != " " and not row["response"][0].islower()
        # Whole lines or sentences of the document, in their order
        source_words, at = " ".join(tokens(texts[row["document"]])), 0
        for line in row["response"].split("\n"):
            at = source_words.find(" ".join(tokens(line)), at)
            assert at >= 0 or "&" in texts[row["document"]]
        assert "http" not in row["response"] and "click here" not in row["response"].lower()
    responses = [row["response"] for row in rows]
    assert all(earlier is None for earlier in near_duplicates(responses, 0.7))
    prepare(config)
    assert (tmp_path / "out.jsonl").read_bytes() == first
    # All documents twice: each segment comes back as a near-duplicate of the first
    twice = documents(tmp_path, [{"text": text} for text in texts for _ in range(2)], "twice.jsonl")
    prepare(dataclasses.replace(config, input=twice))
    assert [row["response"] for row in read(tmp_path / "out.jsonl")] == responses


def test_curated_answers_pass_more_often_than_web_text(shared_data):
    """Answers of an assistant, long enough to judge: most of them are taken for answers."""
    rows = json.loads((shared_data / "alpaca_en_demo.json").read_text())
    answers = [row["output"] for row in rows if 60 <= len(row["output"].split()) <= 280]
    passed = sum(any(p.fault is None for p in cut(answer, CONFIG)) for answer in answers)
    assert len(answers) > 200 and passed / len(answers) > 0.6
