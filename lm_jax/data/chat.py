"""Chat templates, which are programs of the checkpoint's: run in transformers' sandbox, and not without end.

The sandbox keeps a template from Python's insides and from changing its arguments; what it costs is bounded here.
"""

import contextlib
import datetime
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_jax.data.messages import decoded_arguments, map_call_arguments

# The day of every template that asks for one, as Llama 3's do: today's would make a row's ids depend on the day.
# Llama 3.1 takes this day by itself.
TEMPLATE_DAY = datetime.datetime(2024, 7, 26)
_SECONDS = 10.0  # a template takes microseconds
_BYTES = 2 << 30  # by which this process may grow meanwhile
_ADDED = 1_000_000  # characters, beside twice those of the messages
_TICK = 0.1  # seconds between two looks
_clock = threading.RLock()  # while the clock that templates read stands still


class Unbounded(Exception):
    """A template that would not end, or that wrote too much."""


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """The messages as the chat template shows them.

    Arguments of tool calls reach the template as objects where they are a string of JSON; as the string where it then
    refuses. `date_string` and `strftime_now` give TEMPLATE_DAY.

    Args:
      tokenizer: its `chat_template_kwargs`, from `load_tokenizer`, reach the template too.
      options: those of transformers' apply_chat_template, and what else the template takes.

    Raises:
      Unbounded: it took longer, more memory or more text than any template has a use for. Time and memory are watched
        in the main thread alone, where signals arrive.
      Exception: a template can raise anything.
    """
    own = getattr(tokenizer, "chat_template_kwargs", {})
    options = {"date_string": TEMPLATE_DAY.strftime("%d %b %Y"), **own, **options}
    given = [dict(message) for message in messages]
    decoded = map_call_arguments(given, decoded_arguments)
    with _watched(), _stopped_clock():
        try:
            text = tokenizer.apply_chat_template(decoded, tokenize=False, **options)
        except Unbounded:
            raise
        except Exception:
            if decoded == given:
                raise
            text = tokenizer.apply_chat_template(given, tokenize=False, **options)
    length = sum(len(str(message)) for message in given) + len(str(options.get("tools") or ""))  # calls among them
    if len(text) > _ADDED + 2 * length:
        raise Unbounded(f"it makes {len(text):,} characters of a short conversation")
    return text


class _Day(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "_Day":
        return cls(TEMPLATE_DAY.year, TEMPLATE_DAY.month, TEMPLATE_DAY.day, tzinfo=tz)


@contextlib.contextmanager
def _stopped_clock() -> Iterator[None]:
    """Transformers' `strftime_now` gives TEMPLATE_DAY. A function in its place would not be called: what a template
    gets is made plain data first."""
    from transformers.utils import chat_template_utils

    with _clock:
        clock = chat_template_utils.datetime
        setattr(chat_template_utils, "datetime", _Day)  # noqa: B010 mypy has a class there, which is no variable
        try:
            yield
        finally:
            setattr(chat_template_utils, "datetime", clock)  # noqa: B010


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    end, peak = time.monotonic() + _SECONDS, _peak_bytes() + _BYTES

    def look(*_) -> None:
        if time.monotonic() > end:
            raise Unbounded(f"it does not end within {_SECONDS:g} seconds")
        if _peak_bytes() > peak:
            raise Unbounded(f"it takes more than {_BYTES >> 30} GiB of memory")

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, _TICK, _TICK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
