"""The tokenizer and chat template that a GGUF file carries, as the files of a Hugging Face directory.

What llama.cpp knows of a model's tokenizer, and no more: its tokens with their kinds, merges or scores, and the name of
the rule by which text is cut up before merging. transformers' own reader falls back to GPT-2's rule for the names that
it does not know, among them SmolLM's, and so gives other ids for digits; here an unknown name is refused.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lm_jax.checkpoints.directories import made_directory
from lm_jax.checkpoints.gguf import gguf_config, read_gguf
from lm_jax.console import say
from lm_jax.errors import UserError
from lm_jax.strict_json import dumps

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6  # kinds of tokens; 1: normal
_SPACE = "\u2581"  # sentencepiece's

# The rules, as the tokenizers that the models were trained with have them
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD, _LINES = r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_EITHER = [rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"]
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES}"
_TEKKEN = rf"{'|'.join(_EITHER)}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}"
_GPT4O = (
    rf"{'|'.join(f'{word}{_CONTRACTION}?' for word in _EITHER)}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}"
)
_RULES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "jais", "exaone4"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "smaug-bpe", "dbrx", "chatglm-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4"), (_GPT4O,)),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}"),
}
_WHOLE_FIRST = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")  # a word that is a token needs no merges
_BEGIN = (*_WHOLE_FIRST[:3], "tekken")  # begin every text with BOS unless the file says otherwise
# Tokens that end an answer in some model's chat, where they are control tokens
_ENDS = frozenset(
    """
    <|eot_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> <|eom_id|> <|end_of_text|> <|return|> <EOT>
    <|endofturn|> <\uff5cend\u2581of\u2581sentence\uff5c>
    """.split()
)


def gguf_directory(path: Path) -> str:
    """A directory with the config.json, tokenizer and templates of a GGUF file, which goes with this process.

    Raises:
      UserError: as `read_gguf`, `gguf_config` and `write_tokenizer`.
    """
    stat = path.stat()
    return _directory(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _directory(path: Path, *version: int) -> str:
    header, directory = read_gguf(path), made_directory(path.stem)
    config = gguf_config(path, header)
    generation = write_tokenizer(path, header.metadata, directory)
    (directory / "generation_config.json").write_text(dumps(generation))
    (directory / "config.json").write_text(dumps(config | generation))
    return str(directory)


def write_tokenizer(path: Path, metadata: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Writes the tokenizer's files of a GGUF file into a directory.

    Returns:
      What of generation_config.json the metadata says: the tokens that begin, end and pad.

    Raises:
      UserError: no tokenizer in the file, or one of a kind that is not read, by its name.
    """
    import transformers

    given = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
    tokens: list[str] = given.get("tokens") or []
    kinds = given.get("token_type") or [1] * len(tokens)
    if not tokens or len(kinds) != len(tokens):
        raise UserError(f"{path}: no tokenizer in it (tokenizer.ggml.tokens); convert the model anew")
    ids: dict[str, int] = {name: given.get(f"{key}_token_id", -1) for name, key in _NAMED.items()}
    ids = {name: i for name, i in ids.items() if 0 <= i < len(tokens)}
    used = [i for i, kind in enumerate(kinds) if kind != _UNUSED or i in ids.values()]
    vocab = {tokens[i]: i for i in used}
    if len(vocab) != len(used):
        raise UserError(f"{path}: {len(used) - len(vocab)} tokens stand twice in its tokenizer; use another file")
    if (kind := str(given.get("model"))) not in _BUILDERS:
        raise UserError(
            f"{path}: tokenizer.ggml.model={kind!r} is not read, but {' and '.join(_BUILDERS)}; give the model's "
            "Hugging Face directory"
        )
    try:
        tokenizer = _BUILDERS[kind](path, given, vocab, kinds)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: its tokenizer is damaged ({str(error).splitlines()[0]}); use another file") from error
    special = [t for t, i in vocab.items() if kinds[i] == _CONTROL or t in _ENDS or i in ids.values()]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, i in vocab.items() if kinds[i] == _USER_DEFINED])
    around = [ids["bos_token"]] if given.get("add_bos_token", _adds_bos(given)) and "bos_token" in ids else []
    after = [ids["eos_token"]] if given.get("add_eos_token") and "eos_token" in ids else []
    if around or after:
        named = {tokens[i]: i for i in (*around, *after)}
        single = [*(tokens[i] for i in around), "$A", *(tokens[i] for i in after)]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(named.items()))
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{name: tokens[i] for name, i in ids.items()},
    )
    wrapped.save_pretrained(directory)
    ends = [ids["eos_token"]] if "eos_token" in ids else []
    ends += [given[key] for key in ("eot_token_id", "eom_token_id") if key in given]
    ends += [i for t, i in vocab.items() if t in _ENDS]
    found: dict[str, Any] = {f"{name}_id": ids[name] for name in ("bos_token", "pad_token") if name in ids}
    return found | {"eos_token_id": list(dict.fromkeys(ends))}


_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _adds_bos(given: Mapping[str, Any]) -> bool:
    return given["model"] == "llama" or given.get("pre") in _BEGIN


def _byte_level(path: Path, given: Mapping[str, Any], vocab: dict[str, int], kinds: Sequence[int]) -> Tokenizer:
    rule = given.get("pre") or "default"
    if rule == "default":
        say(f"{path}: names no rule by which its tokenizer cuts text up (tokenizer.ggml.pre); GPT-2's is taken")
    elif rule not in _RULES:
        raise UserError(
            f"{path}: tokenizer.ggml.pre={rule!r} is not read, but {', '.join(_RULES)}; give the model's Hugging Face "
            "directory"
        )
    merges = [_pair(merge) for merge in given.get("merges") or []]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=rule in _WHOLE_FIRST))
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _RULES.get(rule, (_GPT2,))]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    at = merge.find(" ", 1)
    return merge[:at], merge[at + 1 :]


def _sentencepiece(path: Path, given: Mapping[str, Any], vocab: dict[str, int], kinds: Sequence[int]) -> Tokenizer:
    scores = given.get("scores") or []
    if len(scores) < len(kinds):
        raise UserError(f"{path}: its tokenizer has no scores (tokenizer.ggml.scores); convert the model anew")
    unknown = next((t for t, i in vocab.items() if kinds[i] == _UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges({t: i for t, i in vocab.items() if kinds[i] == 1}, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=any(kind == _BYTE for kind in kinds),
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    decoder = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if given.get("add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        decoder.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(decoder)
    return tokenizer


def _merges(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Pairs of tokens that make a third one, best first: sentencepiece merges by the score of what comes out."""
    pairs = []
    for token, i in vocab.items():
        halves = [(token[:at], token[at:]) for at in range(1, len(token))]
        inside = [(vocab[a], vocab[b], a, b) for a, b in halves if a in vocab and b in vocab]
        pairs += [(-scores[i], i, *pair) for pair in sorted(inside)]
    return [(a, b) for *_, a, b in sorted(pairs)]


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}
