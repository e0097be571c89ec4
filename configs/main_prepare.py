"""Responses without instructions, cut out of documents, for MAIN (arXiv 2504.12913) to write instructions for.

    python -m launch.main_prepare --config=configs/main_prepare.py --config.input=documents.jsonl \
        --config.output=responses.jsonl

Expect: a table of the lines and segments that were dropped and why; `responses.jsonl` with `id`, `response` and
`document`; beside it `responses.jsonl.dropped.jsonl` (the dropped segments: read some, and tune) and
`responses.jsonl.counts.json` (the table). Of raw web text about two documents in five give one segment. The rules are
strict on purpose: raw text is plentiful, and what is no answer has no instruction.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.input = placeholder(str)  # .jsonl .json .parquet, a saved dataset, a hub id, a .txt file, or a directory of those
    c.columns = ""  # ours=yours: "id=key" (docs/data.md); none: by their own names
    c.max_dropped_share = 0.01  # of a file's rows that may be faulty and are left out; with more nothing is written
    c.output = placeholder(str)  # a local .jsonl; appears when it is whole
    c.column = "text"  # where the rows have their document
    c.near_duplicate = 0.7  # segments that share this part of their word trigrams are one (Jaccard); 0: off
    c.max_repeats = 2  # a short line that stands in more documents than this is page furniture

    c.segments = ConfigDict()
    c.segments.min_words = 40  # less is a caption or a remark
    c.segments.max_words = 300  # most answers are shorter, and a small model's context is soon full
    c.segments.max_symbols = 0.2  # of a line's characters, digits among them; more is a table, a menu or code
    c.segments.max_upper = 0.3  # of a line's letters; more is a banner
    c.segments.max_numbers = 0.1  # of the words; more is a table, results or prices
    c.segments.max_exclamations = 0.2  # of the sentences; more is an advertisement or a comment
    # The language: a text in it has many of its commonest words, one in another language hardly any, and neither has a
    # heap of keywords. For another language than English give its own words here and in the two lists below
    c.segments.stop_words = tuple(
        "a all an and are as at be been but by can do for from had has have he her his how if in into is it its may "
        "more most not of on one or other our out she so some than that the their them there they this to up was we "
        "were what when which who will with would you your".split()
    )
    c.segments.min_stop_words = 0.28  # of the words; English prose has 0.35 to 0.5
    # A segment that begins with one of these goes on from something else
    c.segments.dangling_words = tuple(
        "he she they his her their these those them this that however but and so also then therefore thus or yet "
        "still too such moreover furthermore meanwhile instead otherwise nevertheless additionally".split()
    )
    c.segments.personal_words = ("i", "me", "my", "mine", "myself", "we", "our", "us")  # of a writer about himself
    c.segments.max_personal_words = 0.02  # of the words; more is a diary, a comment or a firm about itself; 1: off
    return c
