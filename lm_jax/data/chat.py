"""Chat templates, which are programs of the checkpoint's: run in transformers' sandbox, and not without end.

The sandbox keeps a template from Python's insides and from changing its arguments; what it costs is bounded here.
"""

import contextlib
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_SECONDS = 10.0  # a template takes microseconds
_BYTES = 2 << 30  # by which this process may grow meanwhile
_ADDED = 1_000_000  # characters, beside twice those of the messages
_TICK = 0.1  # seconds between two looks


class Unbounded(Exception):
    """A template that would not end, or that wrote too much."""


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """The messages as the chat template shows them; `options` are those of transformers' apply_chat_template.

    Raises:
      Unbounded: it took longer, more memory or more text than any template has a use for. Time and memory are watched
        in the main thread alone, where signals arrive.
      Exception: a template can raise anything.
    """
    with _watched():
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    given = sum(len(str(message)) for message in messages) + len(str(options.get("tools") or ""))  # calls among them
    if len(text) > _ADDED + 2 * given:
        raise Unbounded(f"it makes {len(text):,} characters of a short conversation")
    return text


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
