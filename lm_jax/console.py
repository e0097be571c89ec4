"""What a person watches on stderr: lines and progress, of process 0."""

import sys
import time

import jax

from lm_jax.distributed.processes import worked


class Progress:
    """A bar on a terminal, a plain line every few seconds elsewhere; process 0 only."""

    def __init__(self, total: int, done: int, unit: str, every_seconds: float = 10.0):
        self._total, self._done, self._unit, self._every = total, done, unit, every_seconds
        self._begin = self._last = time.monotonic()
        self._first = done
        self._bar = None
        self._silent = jax.process_index() != 0
        if not self._silent and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit=unit, dynamic_ncols=True)

    def update(self, done: int, shown: dict[str, str]) -> None:
        """Shows that `done` of the total are done, with a few named values."""
        worked()
        if self._silent:
            return
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(done - self._done)
        self._done = done
        now = time.monotonic()
        if self._bar is None and (now - self._last >= self._every or done >= self._total):
            self._last = now
            left = (self._total - done) * (now - self._begin) / max(done - self._first, 1)
            values = "  ".join(f"{k} {v}" for k, v in shown.items())
            print(f"{self._unit} {done}/{self._total}  {values}  left {left:.0f}s", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def say(line: str) -> None:
    """A line on stderr, of process 0; a bar stays readable."""
    if jax.process_index() == 0:
        tqdm = sys.modules.get("tqdm")
        (print if tqdm is None else tqdm.tqdm.write)(line, file=sys.stderr)
