"""(prompt, response), as text or messages, to token ids. A mask is two lengths: the response follows the prompt."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from lm_jax.data.messages import Text
from lm_jax.data.rendering import Rendered, Renderer
from lm_jax.errors import UserError

T = TypeVar("T")
_BATCH = 1024  # rows tokenised at once: enough to keep the tokenizer's threads busy, little as Python lists
_ANCHORS = ("\n", "a", "0", "")  # see TextEncoder._tokenize_apart


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedResponse:
    """Token ids of one (prompt, response)."""

    prompt_ids: np.ndarray  # int32 [P], P >= 1
    response_ids: np.ndarray  # int32 [R], R >= 1; its end token included unless truncated
    full_length: int  # R before truncation
    boundary_split: bool  # the tokenizer would merge prompt and response; the response was tokenised apart
    loss_mask: np.ndarray | None = None  # bool [R], the assistant's tokens among other turns'; None: all are

    @property
    def truncated(self) -> bool:
        return len(self.response_ids) < self.full_length


class TextEncoder:
    """Encodes rows as the model sees them in training, in scoring and, for prompts, in generation.

    Raw strings: leading special tokens, prompt, response, eos (unless the response ends with its text). Messages: the
    chat template, up to the end token after the response. The prompt's ids are those that generation starts from: where
    a tokenizer merges across the boundary, the response is tokenised apart (TRL cuts the merged end of the prompt off).

    Args:
      tokenizer: from `tokenizers.load_tokenizer`.
      max_length: tokens of prompt and response together; a longer row loses the response's tail.
      end_ids: from `tokenizers.end_token_ids`; defaults to the tokenizer's eos alone.
    """

    def __init__(self, tokenizer: Any, max_length: int, end_ids: Sequence[int] = ()):
        self._tokenizer, self._renderer = tokenizer, Renderer(tokenizer)
        self._max_length = max_length
        self._eos_text = tokenizer.eos_token
        self._end_ids = frozenset({tokenizer.eos_token_id, *end_ids})
        self._lead = self._leading_special_tokens()
        head, after, alone = self._tokenize(["\n", "\na", "a"])
        self._adds_prefix = after[: len(head)] == head and after[len(head) :] != alone

    def encode(self, prompt: Text, response: Text, where: str) -> EncodedResponse:
        """One row; raises what `encode_many` gives in its place."""
        return checked(self.encode_many([prompt], [response], [where]))[0]

    def encode_many(
        self, prompts: Sequence[Text], responses: Sequence[Text], wheres: Sequence[str]
    ) -> list[EncodedResponse | UserError]:
        """Encodes many rows, in batches over the tokenizer's threads.

        Args:
          prompts: strings, or messages.
          responses: strings, or messages; a string after a prompt of messages is an assistant message. Of several
            messages all is the response, other turns too.
          wheres: name of each row in errors, as "pairs.jsonl row 17 (chosen)".

        Returns:
          Each row's ids or, in their place, what is wrong with it and the cure: malformed or empty text, no chat
          template or one that fails or shows the prompt otherwise below several messages, doubled BOS or EOS, no end
          token, no room for the response. `checked` raises such an error.
        """
        rows = self._encode(prompts, responses, wheres, self._renderer.row)
        return [row if isinstance(row, UserError) else row[0] for row in rows]

    def encode_conversations(
        self, prompts: Sequence[Text], responses: Sequence[Text], wheres: Sequence[str]
    ) -> list[list[EncodedResponse] | UserError]:
        """As `encode_many`, but of responses of several messages each turn of the assistant is learnt,
        but for those of WEIGHT 0.

        What generation would start from stands before each turn, and each ends with its end token. An example holds as
        many turns as the chat template shows one after the other, told from the others' in `loss_mask`: all, unless the
        template shows earlier turns otherwise once later ones follow, as those do that drop thoughts. A turn whose
        context does not fit `max_length` is left out, and the example before it counts as truncated.
        """
        return self._encode(prompts, responses, wheres, self._renderer.turns)

    def _encode(
        self,
        prompts: Sequence[Text],
        responses: Sequence[Text],
        wheres: Sequence[str],
        render: Callable[[Text, Text, str], list[Rendered]],
    ) -> list[list[EncodedResponse] | UserError]:
        encoded: list[list[EncodedResponse] | UserError] = []
        for batch in _batches(list(zip(prompts, responses, wheres, strict=True))):
            rendered = [attempt(render, *row) for row in batch]
            texts = [text for examples in rendered if isinstance(examples, list) for r in examples for text in r.texts]
            tokenized = iter(self._tokenize(texts))
            for (*_, where), examples in zip(batch, rendered, strict=True):
                if isinstance(examples, list):
                    ids = [list(itertools.islice(tokenized, len(r.texts))) for r in examples]
                    encoded.append(attempt(self._examples, examples, ids, where))
                else:
                    encoded.append(examples)
        return encoded

    def _examples(
        self, rendered: list[Rendered], tokenized: list[list[list[int]]], where: str
    ) -> list[EncodedResponse]:
        found: list[EncodedResponse] = []
        for r, ids in zip(rendered, tokenized, strict=True):
            if found and len(ids[0]) >= self._max_length:
                lost = found[-1].full_length + len(ids[-1]) - len(ids[0])
                found[-1] = dataclasses.replace(found[-1], full_length=lost)
            else:
                found.append(self._split(r, ids, where))
        return found

    def encode_prompt(self, prompt: Text, where: str) -> np.ndarray:
        """One prompt to generate from; raises what `encode_prompts` gives in its place."""
        return checked(self.encode_prompts([prompt], [where]))[0]

    def encode_prompts(self, prompts: Sequence[Text], wheres: Sequence[str]) -> list[np.ndarray | UserError]:
        """Prompts to generate from: int32 [P] each, P < max_length, the `prompt_ids` that `encode_many` gives.

        What is wrong with one stands in its place, as in `encode_many`.
        """
        encoded: list[np.ndarray | UserError] = []
        for batch in _batches(list(zip(prompts, wheres, strict=True))):
            rendered = [attempt(self._renderer.prompt, *row) for row in batch]
            tokenized = iter(self._tokenize([r.texts[0] for r in rendered if isinstance(r, Rendered)]))
            for r, (_, where) in zip(rendered, batch, strict=True):
                if isinstance(r, Rendered):
                    encoded.append(attempt(self._prompt_ids, r, next(tokenized), where))
                else:
                    encoded.append(r)
        return encoded

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]

    def _leading_special_tokens(self) -> tuple[int, ...]:
        """The ids that the tokenizer sets before a text. Those that it sets after one (an EOS) are left out."""
        for probe in ("a", self._eos_text):  # a small vocabulary may have no "a"
            plain = self._tokenize([probe])[0]
            around = self._tokenizer(probe, add_special_tokens=True)["input_ids"]
            for start in range(len(around) - len(plain) + 1):
                if plain and around[start : start + len(plain)] == plain:
                    return tuple(around[:start])
        raise UserError("the tokenizer cannot encode even its own eos token; check tokenizer.json")

    def _tokenize_apart(self, text: str) -> list[int]:
        """`text` as it is tokenised in the middle of a text.

        A sentencepiece-like tokenizer sets a space before every text. Kept, the response would decode to " text", which
        the user did not write and which the model would not generate there, so such a tokenizer gets an anchor to begin
        with, whose tokens are then cut off. An anchor that merges with `text` does not serve: the next one is tried.
        """
        for anchor in _ANCHORS if self._adds_prefix else ("",):
            head, whole = self._tokenize([anchor, anchor + text])
            if whole[: len(head)] == head:
                break
        return whole[len(head) :]

    def _split(self, rendered: Rendered, tokenized: list[list[int]], where: str) -> EncodedResponse:
        prompt_ids = self._prompt_ids(rendered, tokenized[0], where)
        ids, boundary_split = tokenized[0], False
        after: list[int] = []
        mask: list[bool] = []
        texts = itertools.pairwise(rendered.texts)
        for number, ((before, text), whole) in enumerate(zip(texts, tokenized[1:], strict=True)):
            if whole[: len(ids)] == ids:
                added = whole[len(ids) :]
            else:
                boundary_split = True
                added = [*after, *self._tokenize_apart(text[len(before) :])]
            response = number % 2 == 0
            kept = self._check_end(added, where) if response else added
            after = added[len(kept) :]  # white space that the template sets after an end token
            ids = [*ids, *kept]
            mask += [response] * len(kept)
        response_ids = np.asarray(ids[len(tokenized[0]) :], np.int32)
        learnt = np.flatnonzero(mask[: self._max_length - len(prompt_ids)])[-1] + 1
        loss_mask = None if all(mask) else np.array(mask[:learnt])
        return EncodedResponse(prompt_ids, response_ids[:learnt], len(response_ids), boundary_split, loss_mask)

    def _prompt_ids(self, rendered: Rendered, ids: list[int], where: str) -> np.ndarray:
        lead, bos = list(self._lead), self._tokenizer.bos_token_id
        ids = [*(lead if rendered.raw else ()), *ids]
        if (lead and ids[: 2 * len(lead)] == 2 * lead) or (bos is not None and ids[:2] == [bos, bos]):
            raise UserError(
                f"{where}: doubled BOS: the prompt begins with {self._tokenizer.decode(ids[: len(lead) or 1])!r}, "
                "which the tokenizer or its chat template adds by itself; remove it from the text"
            )
        if not ids:
            raise UserError(
                f"{where}: the prompt has no tokens, so nothing stands before the response's first; give a prompt"
            )
        if len(ids) >= self._max_length:
            raise UserError(
                f"{where}: the response is lost to truncation: the prompt alone has {len(ids)} tokens and max_length "
                f"is {self._max_length}; raise max_length or drop the row"
            )
        return np.asarray(ids, np.int32)

    def _check_end(self, ids: list[int], where: str) -> list[int]:
        """The response's ids up to its end token."""
        end = next((i + 1 for i in range(len(ids) - 1, -1, -1) if ids[i] in self._end_ids), 0)
        if not ids or (end and all(i in self._end_ids for i in ids[:end])):
            raise UserError(
                f"{where}: the response is empty once tokenised, so its mask would be; drop the row, or mend the chat "
                "template if it leaves the response out"
            )
        # A template may set white space after the end token; anything else there means that the end token is an earlier
        # turn's, or the text's own
        if end == 0 or self._tokenizer.decode(ids[end:]).strip():
            named = ", ".join(map(str, self._tokenizer.convert_ids_to_tokens(sorted(self._end_ids))))
            raise UserError(
                f"{where}: end token not trained: the response ends with {self._tokenizer.decode(ids[-8:])!r} and no "
                f"end token ({named}) after it; mend the chat template so that it emits one, or name the one that it "
                "emits as eos_token_id in generation_config.json"
            )
        if end > 1 and ids[end - 1] == ids[end - 2]:
            raise UserError(
                f"{where}: doubled EOS: the response ends with {self._tokenizer.decode(ids[end - 2 : end])!r}; remove "
                "the end token from the text, it is added"
            )
        return ids[:end]


def attempt(do: Callable[..., T], *args: Any) -> T | UserError:
    """What `do` gives, or the error that it raises."""
    try:
        return do(*args)
    except UserError as error:
        return error


def checked(encoded: Sequence[T | UserError]) -> list[T]:
    """`encoded`, where every row could be; raises the first error that stands in a row's place."""
    if fault := next((row for row in encoded if isinstance(row, UserError)), None):
        raise fault
    return [row for row in encoded if not isinstance(row, UserError)]


def _batches(rows: list[Any]) -> Iterator[list[Any]]:
    return (rows[i : i + _BATCH] for i in range(0, len(rows), _BATCH))
