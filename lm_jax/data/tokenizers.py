"""Tokenizers from disk: loaded without code of theirs, their end tokens, and what tells two of them apart."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from etils import epath

from lm_jax.console import say
from lm_jax.data.chat import render_chat
from lm_jax.data.messages import TEMPLATE_KWARGS, read_template_kwargs
from lm_jax.data.turns import opening_of_thoughts
from lm_jax.errors import UserError

# What tokenizers' rules differ in: spaces, line breaks, digits, contractions, scripts, characters of several bytes
_PROBES = (
    "def f(x):\n    return x\n",
    "  two  spaces,\tone tab\t\tand\n\n\nlines \r\n end. ",
    "0 12 345 6789 3.14 1,000,000",
    "I'm sure THEY'LL say it's 50% (of 2^10) -> <b>#1</b>",
    "naïve Ångström ﬁ e\u0301 Straße",
    "中文，日本語テスト 한국어 العربية हिन्दी",
    "🙂👩‍👩‍👧 𝔘 \u00a0\u200b\u3000",
)
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(model_dir: str, vocab_size: int | None = None, chat_template_kwargs: str = "") -> Any:
    """The transformers tokenizer of a checkpoint directory (or hub id). Runs no code from the checkpoint.

    Where there is a tokenizer.json its ids are those of the `tokenizers` library for that file, whatever the model's
    type: for some types AutoTokenizer sets rules of its own in its place, and other texts come out.

    Args:
      model_dir: directory with the tokenizer's files.
      vocab_size: rows of the model's embedding; None: do not check.
      chat_template_kwargs: JSON of what the chat template takes besides; becomes the tokenizer's attribute of that
        name, which `render_chat` reads.

    Raises:
      UserError: no tokenizer there, ids beyond the embedding, no end-of-text token, or kwargs that are none.
    """
    kwargs = read_template_kwargs(chat_template_kwargs, f"config.{TEMPLATE_KWARGS}")
    path = epath.Path(model_dir)
    if path.is_dir() and not any((path / name).exists() for name in _FILES):
        raise UserError(f"{model_dir}: no tokenizer in it; copy tokenizer.json and tokenizer_config.json there")
    try:
        written = (path / "tokenizer.json").exists()
        tokenizer = _as_written(model_dir) if written else _by_model_type(model_dir)
        if tokenizer.is_fast:
            tokenizer("a")  # some faults show only now
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # many kinds, none of the library's own; a panic of its Rust part is no Exception
        raise UserError(
            f"{model_dir}: its tokenizer cannot be loaded ({first_line(error)}); check the path, and that "
            "tokenizer.json and tokenizer_config.json are whole"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"{model_dir}: its tokenizer has no fast form; save one with a tokenizer.json there")
    size = max(len(tokenizer), 1 + max(token_ids(tokenizer), default=0))
    if vocab_size is not None and size > vocab_size:
        raise UserError(
            f"{model_dir}: vocabulary larger than the embedding: the tokenizer has {size} ids, the embedding "
            f"{vocab_size} rows; use the tokenizer that the model was trained with, or resize the embedding"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"{model_dir}: its tokenizer has no eos token; set eos_token in tokenizer_config.json")
    if unread := [name for name in kwargs if name not in str(tokenizer.chat_template)]:
        say(f"config.{TEMPLATE_KWARGS}: the chat template of {model_dir} does not read {', '.join(unread)}")
    tokenizer.chat_template_kwargs = kwargs
    return tokenizer


def token_ids(tokenizer: Any) -> list[int]:
    """The ids of all its tokens, added ones too; they may have holes, and end below the model's vocabulary."""
    return sorted({*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder})


def _by_model_type(model_dir: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)


def _as_written(model_dir: str) -> Any:
    """The tokenizer of a directory's tokenizer.json, with the special tokens and the template of its other files."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    written = Tokenizer.from_file(str(epath.Path(model_dir) / "tokenizer.json"))
    written.no_truncation()
    written.no_padding()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    named = tokenizer.special_tokens_map
    if tokenizer.eos_token is None:  # where the directory does not say, the model type's class may
        with contextlib.suppress(Exception):
            defaults = _by_model_type(model_dir).special_tokens_map
            named |= {name: token for name, token in defaults.items() if written.token_to_id(token) is not None}
    around = written.encode("a").tokens
    adds = {"add_bos_token": around[0] == named.get("bos_token"), "add_eos_token": around[-1] == named.get("eos_token")}
    wanted = adds | {name: value for name, value in _config(model_dir).items() if name in adds and value is not None}
    # Reading may have changed how special tokens are found, and what stands around a text
    if named != tokenizer.special_tokens_map or not _alike(tokenizer.backend_tokenizer, written, wanted == adds):
        tokens = [token for _, token in sorted(tokenizer.added_tokens_decoder.items())]
        written.add_tokens([token for token in tokens if written.token_to_id(token.content) is None])
        for token in written.get_added_tokens_decoder().values():
            if token.content in named.values() and not token.special:
                token.special = True  # decoding may leave it out; how it is found in a text stays
                written.add_special_tokens([token])
        kept = {name: getattr(tokenizer, name) for name in ("chat_template", "clean_up_tokenization_spaces")}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=written, **kept, **named)
    if wanted != adds:
        say(f"{model_dir}: what stands around a text is as tokenizer_config.json has it, {wanted}, not tokenizer.json")
        tokenizer.add_bos_token, tokenizer.add_eos_token = wanted.values()
    return tokenizer


def _config(model_dir: str) -> dict[str, Any]:
    """What tokenizer_config.json says, which was read once already. Transformers 5 leaves `add_bos_token` in it out."""
    path = epath.Path(model_dir) / "tokenizer_config.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _alike(backend: Any, written: Any, around: bool) -> bool:
    """Whether two backends give the same ids, and texts of them; `around`: with what they set around a text."""
    specials = [token.content for token in written.get_added_tokens_decoder().values()]
    texts = [*_PROBES, *(f"a {token} b\n{token}\n{token}c" for token in specials)]
    ids = [[e.ids for e in b.encode_batch(texts, add_special_tokens=around)] for b in (backend, written)]
    return ids[0] == ids[1] and backend.decode_batch(ids[0], False) == written.decode_batch(ids[0], False)


def end_token_ids(model_dir: str, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a response: the tokenizer's eos, then those of generation_config.json, or where that names none
    those of config.json (transformers and vLLM read both so).

    Raises:
      UserError: one of the files is broken, or names an end token that can be none.
    """
    ids = [tokenizer.eos_token_id]
    for path in (epath.Path(model_dir) / name for name in ("generation_config.json", "config.json")):
        try:
            found = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
            ids += [int(i) for i in (found if isinstance(found, list) else [found] if found is not None else [])]
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"{path}: eos_token_id cannot be read ({first_line(error)}); mend the file") from error
        if wrong := [i for i in ids if not 0 <= i < 2**31]:
            raise UserError(f"{path}: eos_token_id {wrong[0]} is no token id; mend the file")
        if found is not None:
            break
    return tuple(dict.fromkeys(ids))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 (hex) over all that decides the ids: vocabulary, rules, special tokens, chat template and its kwargs."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    # Calls leave these two behind; the ids here never depend on them
    rules.pop("truncation", None)
    rules.pop("padding", None)
    parts = [rules, tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token]
    parts += filter(None, [getattr(tokenizer, TEMPLATE_KWARGS, None)])
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def takes_system(tokenizer: Any) -> bool:
    """Whether the chat template shows a system message; some refuse it, some leave it out."""
    task = "The task."
    try:
        shown = render_chat(
            tokenizer, [{"role": "system", "content": task}, {"role": "user", "content": "A question."}]
        )
    except Exception:  # a template can raise anything
        return False
    return task in shown


def opens_thoughts(tokenizer: Any, kwargs: Mapping[str, Any] = MappingProxyType({})) -> str:
    """`<think>` or its like where the chat template's prompt of generation ends with it: responses then begin in
    thoughts. Empty where it does not.

    Args:
      kwargs: what the template takes besides.
    """
    try:
        prompt = render_chat(tokenizer, [{"role": "user", "content": "Hi"}], add_generation_prompt=True, **kwargs)
    except Exception:  # a template can raise anything
        return ""
    return opening_of_thoughts(prompt)


def first_line(error: BaseException) -> str:
    """Of what an error says, or its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
