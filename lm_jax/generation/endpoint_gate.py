"""How many requests may be at a server at once, from what it says about having too many."""

import asyncio
import math
import time


class Gate:
    """Lets at most `width` in. While a server has too many requests nobody enters, and afterwards fewer than before."""

    def __init__(self, size: int):
        self._size, self._limit = size, float(size)
        self._inside = 0
        self._opens, self._narrowed = 0.0, -math.inf
        self._left = asyncio.Event()

    @property
    def width(self) -> int:
        return int(self._limit)

    async def __aenter__(self) -> None:
        while True:
            if (wait := self._opens - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            elif self._inside >= self.width:
                self._left.clear()
                await self._left.wait()
            else:
                self._inside += 1
                return

    async def __aexit__(self, *_) -> None:
        self._inside -= 1
        self._left.set()

    def narrow(self, seconds: float, sent: float) -> None:
        """Closes for `seconds`, and halves the width unless it was halved after `sent`, when the request went out."""
        now = time.monotonic()
        self._opens = max(self._opens, now + seconds)
        if sent >= self._narrowed:
            self._limit, self._narrowed = max(1.0, self._limit / 2), now

    def widen(self) -> None:
        """After a success: a tenth more each time that `width` of them have come back."""
        self._limit = min(self._size, self._limit + 0.1)
        self._left.set()
