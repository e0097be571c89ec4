"""Tokenizers from disk: loaded without code of theirs, their end tokens, and what tells two of them apart."""

import hashlib
import json
from typing import Any

from etils import epath

from lm_jax.data.chat import render_chat
from lm_jax.errors import UserError

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(model_dir: str, vocab_size: int | None = None) -> Any:
    """The transformers tokenizer of a checkpoint directory (or hub id). Runs no code from the checkpoint.

    Args:
      model_dir: directory with the tokenizer's files.
      vocab_size: rows of the model's embedding; None: do not check.

    Raises:
      UserError: no tokenizer there, ids beyond the embedding, or no end-of-text token.
    """
    import transformers

    path = epath.Path(model_dir)
    if path.is_dir() and not any((path / name).exists() for name in _FILES):
        raise UserError(f"{model_dir}: no tokenizer in it; copy tokenizer.json and tokenizer_config.json there")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
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
    return tokenizer


def token_ids(tokenizer: Any) -> list[int]:
    """The ids of all its tokens, added ones too; they may have holes, and end below the model's vocabulary."""
    return sorted({*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder})


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
    """sha256 (hex) over all that decides the ids: vocabulary and rules, special tokens, chat template."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    # Calls leave these two behind; the ids here never depend on them
    rules.pop("truncation", None)
    rules.pop("padding", None)
    parts = [rules, tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token]
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


def first_line(error: BaseException) -> str:
    """Of what an error says, or its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
