"""The `Generator` over an OpenAI-compatible server (vLLM, tpu-inference, SGLang), with one policy for faults."""

import asyncio
import collections
import contextlib
import dataclasses
import json
import math
import os
import queue
import random
import re
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_jax.errors import UserError
from lm_jax.generation.endpoint_gate import Gate
from lm_jax.generation.endpoint_wire import Fault, prompt_problem, read_samples, request_body, server_message, wait_hint
from lm_jax.generation.requests import Completion, Request, Sample, SamplingConfig

_MAX_CONCURRENCY = 1000  # connections that the client holds at most
_FIRST_RETRIES = 5  # as long as nothing has ever answered: a wrong url should not take minutes
_TIMEOUT_RETRIES = 2  # an answer that took too long will do so again
_LONGEST_HINT = 10  # times max_delay: how long a server may ask to wait
_SHARE_FROM = 20  # finished requests before the share of failures says something
_QUIET_SECONDS = 10.0  # between two lines about the same kind of trouble
_ERROR_CHARS = 300  # of a server's message


class EndpointGenerator:
    """Asks a server, with many requests in flight; see `requests.Generator`.

    A string goes to the completions route as raw text, messages go to chat completions. Filters that are off are not
    named in the request, because not every server knows them; vLLM and SGLang then take the model's own
    generation_config.json for top-k, min-p and repetition penalty, unless started with `--generation-config vllm` or
    `--sampling-defaults openai`. How far a seed holds is up to the server.

    Transient faults (no connection, time-outs, 408, 409, 429, 5xx, broken answers) are retried with growing delays; 429
    slows all requests down. 401, 403 and 404 end the run; any other refusal is the row's own error. What slows the run
    is said on stderr, one line per kind every ten seconds. The key comes from OPENAI_API_KEY, where the server wants
    one, and is never shown.

    Args:
      url: of the API, as "http://host:8000/v1".
      model: the name that the server has for it.
      concurrency: requests in flight at most, 1 to 1000.
      timeout: seconds for one attempt, from connecting to the last byte.
      connect_timeout: seconds for connecting alone.
      max_retries: of one request; 10 with the delays below outlast about 4 minutes without a server.
      max_failed_share: of finished requests; above it (from 20 on, or at the end) the run stops.
      base_delay: seconds before the first retry; doubles with each. Half to all of it is waited, at random.
      max_delay: seconds, its limit. A server's own wish (`retry-after` and such) counts up to ten times this.
      chat_template_kwargs: what the server's chat template takes besides; vLLM and SGLang pass it on.

    Raises:
      UserError: a setting out of its range.
    """

    def __init__(
        self,
        url: str,
        model: str,
        concurrency: int = 64,
        timeout: float = 600.0,
        connect_timeout: float = 30.0,
        max_retries: int = 10,
        max_failed_share: float = 0.05,
        base_delay: float = 1.0,
        max_delay: float = 60.0,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        if not _is_plain_url(url):
            raise UserError(
                "url: must be like http://host:8000/v1, without user, query or fragment; a key goes into the "
                "environment as OPENAI_API_KEY"
            )
        for name, value, fits, say in (
            ("model", model, bool(model), "the name that the server has for the model"),
            ("concurrency", concurrency, 1 <= concurrency <= _MAX_CONCURRENCY, f"1 to {_MAX_CONCURRENCY}"),
            ("timeout", timeout, 0 < timeout < math.inf, "a positive number of seconds"),
            ("connect_timeout", connect_timeout, 0 < connect_timeout < math.inf, "a positive number of seconds"),
            ("max_retries", max_retries, max_retries >= 0, "0 or more"),
            ("max_failed_share", max_failed_share, 0 <= max_failed_share <= 1, "between 0 and 1"),
            ("base_delay", base_delay, 0 < base_delay < math.inf, "a positive number of seconds"),
            ("max_delay", max_delay, base_delay <= max_delay < math.inf, "a number of seconds from base_delay on"),
        ):
            if not fits:
                raise UserError(f"{name}={value!r}: must be {say}")
        self.url, self.model, self.concurrency = url.rstrip("/"), model, concurrency
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.timeout, self.connect_timeout = timeout, connect_timeout
        self.max_retries, self.max_failed_share = max_retries, max_failed_share
        self.base_delay, self.max_delay = base_delay, max_delay

    def generate(self, requests: Sequence[Request], sampling: SamplingConfig) -> Iterator[list[Completion]]:
        """See `requests.Generator`. Closing the iterator cancels what is in flight.

        Raises:
          UserError: the server is not there, refuses the key, does not know the model or route, or fails too many
            requests; what had been answered until then is yielded first.
        """
        key = os.environ.get("OPENAI_API_KEY", "").strip() or "EMPTY"  # local servers need none
        if not re.fullmatch(r"[!-~]+", key):
            raise UserError("OPENAI_API_KEY: has characters that no HTTP header can carry; set it anew")
        return _Run(self, requests, sampling, key).results() if len(requests) else iter(())


class _Run:
    """One call of `generate`: an event loop in a thread, whose workers share one iterator over the requests."""

    def __init__(self, setup: EndpointGenerator, requests: Sequence[Request], sampling: SamplingConfig, key: str):
        self._setup, self._sampling, self._key = setup, sampling, key
        self._total, self._requests = len(requests), iter(requests)
        self._gate = Gate(setup.concurrency)
        self._room = asyncio.Semaphore(4 * setup.concurrency)  # in flight, or answered and not yet taken
        self._answers: queue.SimpleQueue[Completion | None] = queue.SimpleQueue()  # None: the thread is done
        self._error: BaseException | None = None
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task | None = None
        self._reached = False  # the server has answered something
        self._finished = 0
        self._failed: collections.Counter[str] = collections.Counter()  # by kind: messages may all differ
        self._example: dict[str, str] = {}
        self._said: dict[str, float] = {}
        self._seen: collections.Counter[str] = collections.Counter()

    # In the caller's thread

    def results(self) -> Iterator[list[Completion]]:
        import openai  # noqa: F401  # seconds of import, which nobody else should pay for

        thread = threading.Thread(target=self._run, name="endpoint", daemon=True)
        thread.start()
        try:
            done = False
            while not done:
                batch, done = self._take()
                if batch:
                    yield batch
        finally:
            self._started.wait()
            self._call(self._task.cancel if self._task else lambda: None)
            thread.join()
        if self._error is not None:
            raise self._error

    def _take(self) -> tuple[list[Completion], bool]:
        """All that is there, at least one; and whether that was the last."""
        batch = [self._answers.get()]
        with contextlib.suppress(queue.Empty):
            while True:
                batch.append(self._answers.get_nowait())
        taken = [completion for completion in batch if completion is not None]  # None is the last

        def make_room() -> None:
            for _ in taken:
                self._room.release()

        self._call(make_room)
        return taken, len(taken) < len(batch)

    def _call(self, function) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # closed: nothing is left to tell it
                self._loop.call_soon_threadsafe(function)

    # In the thread

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except asyncio.CancelledError:
            pass
        except BaseExceptionGroup as group:
            self._error = group.exceptions[0]
        except BaseException as error:  # the caller raises it
            self._error = error
        finally:
            self._started.set()
            self._answers.put(None)

    async def _main(self) -> None:
        import openai

        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._started.set()
        setup = self._setup
        client = openai.AsyncOpenAI(
            api_key=self._key,
            base_url=setup.url,
            max_retries=0,
            timeout=openai.Timeout(setup.timeout, connect=setup.connect_timeout, pool=None),
        )
        async with client, asyncio.TaskGroup() as group:
            for _ in range(min(setup.concurrency, self._total)):
                group.create_task(self._work(client))

    async def _work(self, client) -> None:
        while True:
            await self._room.acquire()
            request = next(self._requests, None)
            if request is None:
                return
            answer = await self._answer(client, request)
            if isinstance(answer, Fault):
                self._answers.put(Completion(request.id, (), answer.message))
                self._count(answer)
            else:
                self._answers.put(Completion(request.id, answer, None))
                self._count(None)

    def _count(self, fault: Fault | None) -> None:
        self._finished += 1
        if fault is not None:
            self._failed[fault.kind] += 1
            self._example.setdefault(fault.kind, fault.message)
            self._say(fault.kind, fault.message, "the row is recorded as failed")
        self._check_share()

    def _check_share(self) -> None:
        failed, limit = self._failed.total(), self._setup.max_failed_share
        if self._finished < min(_SHARE_FROM, self._total) or failed <= limit * self._finished:
            return
        kind, times = self._failed.most_common(1)[0]
        raise UserError(
            f"{self._setup.url}: {failed} of {self._finished} requests failed ({failed / self._finished:.0%}, more "
            f"than max_failed_share={limit:g}), {times} of them like this: {self._example[kind]}; mend that, or raise "
            "max_failed_share"
        )

    async def _answer(self, client, request: Request) -> tuple[Sample, ...] | Fault:
        if problem := prompt_problem(request.prompt):
            return Fault("prompt", problem, "row")
        # Greedy samples are all alike, and vLLM refuses to draw several
        wanted = self._sampling.num_samples if self._sampling.temperature else 1
        samples: list[Sample] = []
        while len(samples) < wanted:  # each round brings at least one; a server may ignore n
            found = await self._ask(client, request, wanted - len(samples), len(samples))
            if isinstance(found, Fault):
                return found
            samples += found[: wanted - len(samples)]
        return tuple(samples * (self._sampling.num_samples // wanted))

    async def _ask(self, client, request: Request, n: int, first: int) -> list[Sample] | Fault:
        """Samples `first`, `first + 1`, ..., at least one and perhaps fewer than n, after as many attempts as it takes.

        Raises:
          UserError: a fault that every request would meet.
        """
        setup = self._setup
        body = request_body(request, self._sampling, setup.model, n, first, setup.chat_template_kwargs)
        timeouts = 0
        for attempt in range(1, setup.max_retries + 2):
            async with self._gate:
                sent = time.monotonic()
                answer = await self._attempt(client, body)
            if not isinstance(answer, Fault):
                self._gate.widen()
                return answer
            found = answer
            if found.reach == "run":
                raise UserError(found.message)
            if found.reach == "row":
                return found
            timeouts += found.kind == "time-out"
            retries = setup.max_retries if self._reached else min(setup.max_retries, _FIRST_RETRIES)
            if attempt > retries or timeouts > _TIMEOUT_RETRIES:
                break
            delay = min(setup.max_delay, setup.base_delay * 2.0 ** min(attempt - 1, 60)) * random.uniform(0.5, 1.0)
            hint = None if found.hint is None else min(found.hint, _LONGEST_HINT * setup.max_delay)
            if found.kind == "HTTP 429":
                self._gate.narrow(delay if hint is None else hint, sent)
            delay = max(delay, hint or 0.0)
            self._say(found.kind, found.message, f"next attempt in {delay:.1f} s, {self._gate.width} requests at once")
            await asyncio.sleep(delay)
        times = f"{attempt} attempt{'s' * (attempt > 1)}"
        if not self._reached:
            raise UserError(
                f"{setup.url}: no answer in {times} ({found.message}); start the server, or check the url, its host "
                "and port"
            )
        return dataclasses.replace(found, message=f"{found.message} ({times})")

    async def _attempt(self, client, body: dict[str, Any]) -> list[Sample] | Fault:
        import openai

        # Faults are returned, not raised: an exception would carry the client's own, whose text nobody has cleaned
        chat = "messages" in body
        route = client.chat.completions if chat else client.completions
        try:
            async with asyncio.timeout(self._setup.timeout):
                answer = await route.with_raw_response.create(**body)
            self._reached = True
            found = read_samples(answer.http_response.content, chat)
            return dataclasses.replace(found, message=self._clean(found.message)) if isinstance(found, Fault) else found
        except openai.APIStatusError as error:
            self._reached = True
            return self._status_fault(error)
        except (TimeoutError, openai.APITimeoutError) as error:
            if type(error.__cause__).__name__ == "ConnectTimeout":
                return Fault("connection", f"no connection within {self._setup.connect_timeout:g} s")
            return Fault("time-out", f"no answer within timeout={self._setup.timeout:g} s")
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            return Fault("connection", self._clean(f"connection failed: {str(cause) or type(cause).__name__}"))
        except Exception as error:  # what a client library raises besides; one row must not end the others
            return Fault("client", self._clean(f"{type(error).__name__}: {error}"), "row")

    def _status_fault(self, error) -> Fault:
        status, setup = error.status_code, self._setup
        kind = f"HTTP {status}"
        message = self._clean(f"{kind}: {server_message(error)}")
        if status in (401, 403):
            cure = f"set OPENAI_API_KEY in the environment to a key that may use model {setup.model!r} there"
        elif status == 404:
            cure = f"check that the url ends as the server's API does (mostly /v1) and that it serves {setup.model!r}"
        elif status == 429 and getattr(error, "code", None) == "insufficient_quota":
            cure = "waiting does not help; raise the account's quota"
        elif status in (408, 409, 429) or status >= 500:
            return Fault(kind, message, hint=wait_hint(error.response.headers, status == 429))
        else:
            return Fault(kind, message, "row")
        return Fault(kind, f"{setup.url}: {message}; {cure}", "run")

    def _clean(self, text: str) -> str:
        """One line of bounded length without the key, whatever the server wrote."""
        if self._key != "EMPTY":
            for form in (self._key, json.dumps(self._key)[1:-1], repr(self._key)[1:-1]):
                text = text.replace(form, "[key]")
        text = " ".join(text.split())
        return text if len(text) <= _ERROR_CHARS else text[:_ERROR_CHARS] + "..."

    def _say(self, kind: str, message: str, then: str) -> None:
        self._seen[kind] += 1
        now = time.monotonic()
        if now - self._said.get(kind, -math.inf) < _QUIET_SECONDS:
            return
        self._said[kind] = now
        seen = f"; {self._seen[kind]} like this so far" if self._seen[kind] > 1 else ""
        print(f"{self._setup.url}: {message}; {then}{seen}", file=sys.stderr, flush=True)


def _is_plain_url(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port  # raises where it is no number
    except (ValueError, AttributeError, TypeError):
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not set("@?# ") & set(url)
