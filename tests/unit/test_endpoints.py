"""Generation over an endpoint, against a real server on a loopback port that misbehaves in every way it can."""

import collections
import email.utils
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import pytest

from lm_jax.data.messages import with_arguments
from lm_jax.errors import UserError
from lm_jax.generation.endpoint_gate import Gate
from lm_jax.generation.endpoint_wire import request_body, wait_hint
from lm_jax.generation.endpoints import EndpointGenerator
from lm_jax.generation.requests import Request, SamplingConfig
from tests.http_server import Asked, Reply, Server, completion

KEY = "sk-secret-0123456789"
SAMPLING = SamplingConfig(max_new_tokens=16)
BROKEN = Reply(b'{"choices": [{"text": "half')


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith("OPENAI_")]:
        if name != "OPENAI_API_KEY":
            monkeypatch.delenv(name)


def generator(server: Server | str, **settings) -> EndpointGenerator:
    quick = {"concurrency": 8, "timeout": 5.0, "base_delay": 0.01, "max_delay": 0.2, "max_failed_share": 1.0}
    return EndpointGenerator(getattr(server, "url", server), "tiny", **quick | settings)


def rows(count: int) -> list[Request]:
    return [Request(f"row{i}", f"prompt{i}") for i in range(count)]


def collect(endpoint: EndpointGenerator, requests, sampling=SAMPLING) -> dict:
    """Completions by id, each of which has come once."""
    found = [completion for batch in endpoint.generate(requests, sampling) for completion in batch]
    assert len({completion.id for completion in found}) == len(found)
    return {completion.id: completion for completion in found}


def collect_until_error(endpoint: EndpointGenerator, requests, sampling=SAMPLING) -> tuple[list, UserError]:
    found = []
    with pytest.raises(UserError) as caught:
        for batch in endpoint.generate(requests, sampling):
            assert batch
            found += batch
    assert "\n" not in str(caught.value)
    return found, caught.value


def then(*replies: Reply):
    """A script that gives each row these replies first, and then answers it."""
    seen, lock = collections.Counter(), threading.Lock()

    def script(asked: Asked) -> Reply:
        with lock:
            seen[asked.prompt] += 1
            turn = seen[asked.prompt]
        return replies[turn - 1] if turn <= len(replies) else completion(asked)

    return script


def client_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    return [name for name in names if name != "server" and "process_request_thread" not in name]


def client_sockets(url: str) -> int:
    """Connections of this process to the server's port, from the client's end."""
    port = f":{int(url.split(':')[2].split('/')[0]):04X}"
    inodes = {
        fields[9]
        for fields in (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
        if fields[2].endswith(port) and fields[3] == "01"
    }
    ours = {
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{fd}")
    }
    return sum(f"socket:[{inode}]" in ours for inode in inodes)


def soon(condition, seconds=5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


# What is asked


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (SamplingConfig(max_new_tokens=7), {"n": 1, "temperature": 1.0, "top_p": 1.0, "max_tokens": 7}),
        (
            SamplingConfig(
                max_new_tokens=9, temperature=0.5, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.1,
                num_samples=3, stop=("END", 7, "\n\n", 0), seed=4,
            ),
            {
                "n": 3, "temperature": 0.5, "top_p": 0.9, "max_tokens": 9, "stop": ["END", "\n\n"], "top_k": 20,
                "min_p": 0.05, "repetition_penalty": 1.1, "stop_token_ids": [7, 0],
            },
        ),
    ],
)  # fmt: skip
def test_what_goes_over_the_wire(sampling, expected):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    with Server() as server:
        found = collect(generator(server), [Request("raw", "Once"), Request("chat", messages)], sampling)
    by_path = {asked.path: asked for asked in server.asked}
    assert len(server.asked) == 2
    for path, prompt in (("/v1/completions", {"prompt": "Once"}), ("/v1/chat/completions", {"messages": messages})):
        body = dict(by_path[path].body)
        assert 0 < body.pop("seed") < 2**31
        assert body == {"model": "tiny", **prompt, **expected}
        assert by_path[path].headers["authorization"] == f"Bearer {KEY}"
    assert [s.text for s in found["raw"].samples] == [f"Once -> {i}" for i in range(sampling.num_samples)]
    assert [s.text for s in found["chat"].samples] == [f"Hi -> {i}" for i in range(sampling.num_samples)]


def test_a_requests_own_limit_and_an_absent_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with Server() as server:
        collect(generator(server), [Request("a", "x", max_new_tokens=3)])
    assert server.asked[0].body["max_tokens"] == 3
    assert server.asked[0].headers["authorization"] == "Bearer EMPTY"


def test_seeds_depend_on_seed_and_row_alone():
    def seeds(requests, concurrency, seed):
        with Server() as server:
            collect(generator(server, concurrency=concurrency), requests, SamplingConfig(4, seed=seed))
        return {asked.prompt: asked.body["seed"] for asked in server.asked}

    forward = seeds(rows(20), 8, 0)
    assert forward == seeds(rows(20)[::-1], 1, 0)
    assert len(set(forward.values())) == 20
    assert not set(forward.values()) & set(seeds(rows(20), 8, 1).values())


# What is answered


@pytest.mark.parametrize(("samples", "tokens"), [(1, 5), (2, None)])
def test_answers(samples, tokens):
    with Server(lambda asked: completion(asked, reason="length", tokens=5)) as server:
        found = collect(generator(server), rows(30), SamplingConfig(16, num_samples=samples))
    assert set(found) == {f"row{i}" for i in range(30)}
    for i in range(30):
        completed = found[f"row{i}"]
        assert completed.error is None
        assert [s.text for s in completed.samples] == [f"prompt{i} -> {j}" for j in range(samples)]
        # The usage of several samples is their sum, so none of them is known
        assert {(s.finish_reason, s.num_tokens, s.token_ids, s.logprobs) for s in completed.samples} == {
            ("length", tokens, None, None)
        }


@pytest.mark.parametrize("given", [1, 2])
def test_a_server_that_ignores_n_is_asked_again(given):
    def script(asked):
        return completion(asked, [f"{asked.body['seed']}/{i}" for i in range(given)])

    with Server(script) as server:
        found = collect(generator(server), rows(3), SamplingConfig(16, num_samples=5))
    for i in range(3):
        asked = [a.body for a in server.asked if a.prompt == f"prompt{i}"]
        assert [body["n"] for body in asked] == list(range(5, 0, -given))
        assert len({body["seed"] for body in asked}) == len(asked)
        texts = [s.text for s in found[f"row{i}"].samples]
        assert texts == [f"{body['seed']}/{j}" for body in asked for j in range(given)][:5]
        assert {s.num_tokens for s in found[f"row{i}"].samples} == ({3} if given == 1 else {None})


def test_more_choices_than_asked_for_are_left_out():
    with Server(lambda asked: completion(asked, ["a", "b", "c"])) as server:
        found = collect(generator(server), rows(1), SamplingConfig(16, num_samples=2))
    assert [s.text for s in found["row0"].samples] == ["a", "b"] and len(server.asked) == 1


def test_greedy_samples_are_asked_for_once():
    with Server() as server:
        found = collect(generator(server), rows(1), SamplingConfig(16, temperature=0, num_samples=3))
    assert [s.text for s in found["row0"].samples] == ["prompt0 -> 0"] * 3
    assert [asked.body["n"] for asked in server.asked] == [1]


def test_no_requests_ask_nothing():
    assert list(generator("http://127.0.0.1:1/v1").generate([], SAMPLING)) == []


@pytest.mark.parametrize("reason", ["content_filter", "tool_calls", None])
def test_other_ends_are_failures(reason):
    with Server(lambda asked: completion(asked, reason=reason)) as server:
        found = collect(generator(server), rows(2))
    assert len(server.asked) == 2
    assert all(not c.samples and f"finish_reason {reason!r}" in c.error for c in found.values())


def test_reasoning_without_text_is_a_failure():
    with Server(lambda asked: completion(asked, [None], "length")) as server:
        found = collect(generator(server), [Request("a", [{"role": "user", "content": "Hi"}])])
    assert "no text" in found["a"].error and "raise max_new_tokens" in found["a"].error and len(server.asked) == 1


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "empty"),
        (3, "got int"),
        (None, "got NoneType"),
        ([], "empty list of messages"),
        ([{"role": "user"}], "no content"),
        (["Hi"], "no object but str"),
        ("Hi \ud83d", "half a surrogate pair"),
        ([{"role": "user", "content": "\ud83d"}], "half a surrogate pair"),
        ([{"role": "user", "content": "Hi", "extra": {1, 2}}], "what JSON cannot"),
    ],
)
def test_a_prompt_that_cannot_be_asked(prompt, says):
    with Server() as server:
        found = collect(generator(server), [Request("bad", prompt), *rows(2)])
    assert says in found["bad"].error and not found["bad"].samples
    assert [found[f"row{i}"].error for i in range(2)] == [None, None] and len(server.asked) == 2


# What fails for a while


@pytest.mark.parametrize(
    "reply",
    [
        *(Reply({"error": {"message": "busy"}}, status) for status in (408, 409, 429, 500, 502, 503, 529)),
        Reply(b"<html>Bad gateway</html>", 502, {"Content-Type": "text/html"}),
        BROKEN,
        Reply(b""),
        Reply(b"fine", headers={"Content-Type": "text/plain"}),
        Reply(b"\xff\xfe"),
        Reply({"choices": []}),
        Reply({"choices": None}),
        Reply({"choices": [{"text": 3, "finish_reason": "stop"}]}),
        Reply({"error": {"message": "upstream"}}),
        Reply([1, 2]),
        Reply({"choices": [{"text": "half", "finish_reason": "abort"}]}),
        Reply(b"x" * 1000, cut="half"),
        Reply(cut="all"),
        Reply({}, after=30),
    ],
    ids=lambda reply: f"{reply.status}-{str(reply.body)[:12]}-{reply.cut}-{reply.after}",
)
def test_a_fault_that_passes(reply):
    with Server(then(reply, reply)) as server:
        found = collect(generator(server, timeout=0.4 if reply.after else 5.0, max_retries=2), rows(3))
    assert {c.error for c in found.values()} == {None}
    assert len(server.asked) == 9
    for i in range(3):  # the same request each time, or a retried row would differ from one that went through
        bodies = [asked.body for asked in server.asked if asked.prompt == f"prompt{i}"]
        assert bodies[0] == bodies[1] == bodies[2]


@pytest.mark.parametrize(
    ("reply", "says", "attempts"),
    [
        (Reply({"error": {"message": "on fire"}}, 500), "HTTP 500: on fire (4 attempts)", 4),
        (Reply({"choices": []}), "no choices", 4),
        (Reply({}, after=30), "no answer within timeout=0.25 s (3 attempts)", 3),
        (Reply(b"x" * 1000, between=0.1), "no answer within timeout=0.25 s (3 attempts)", 3),  # of all, not of a byte
    ],
)
def test_a_fault_that_stays_is_recorded(reply, says, attempts):
    def script(asked):
        return reply if asked.prompt == "prompt1" else completion(asked)

    with Server(script) as server:
        found = collect(generator(server, timeout=0.25, max_retries=3, concurrency=1), rows(3))
    assert says in found["row1"].error and not found["row1"].samples
    assert found["row0"].error is found["row2"].error is None
    assert sum(asked.prompt == "prompt1" for asked in server.asked) == attempts


def test_delays_grow_and_are_bounded(monkeypatch):
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    with Server(then(*[Reply({}, 500)] * 5)) as server:
        collect(generator(server, base_delay=0.04, max_delay=0.16, max_retries=5), rows(1))
    times = [asked.at for asked in server.asked]
    waits = [b - a for a, b in zip(times, times[1:], strict=False)]
    for wait, expected in zip(waits, [0.04, 0.08, 0.16, 0.16, 0.16], strict=True):
        assert expected <= wait < expected + 0.5


@pytest.mark.parametrize(
    ("status", "name", "value"),
    [
        (429, "retry-after", "0.3"),
        (503, "retry-after", "0.3"),
        (429, "retry-after", lambda: email.utils.formatdate(time.time() + 2, usegmt=True)),
        (429, "retry-after-ms", "300"),
        (503, "retry-after-ms", "300"),
        (429, "x-ratelimit-reset-requests", "300ms"),
        (429, "x-ratelimit-reset-tokens", "0.3s"),
    ],
)
def test_the_servers_wish_is_kept(status, name, value):
    refused = []

    def script(asked):
        if refused:
            return completion(asked)
        refused.append(time.monotonic())
        return Reply({}, status, {name: value() if callable(value) else value})

    with Server(script) as server:
        collect(generator(server, concurrency=1, max_delay=1.0), rows(1))
    # A date has whole seconds: of the 2 ahead at least 1 is left
    assert 0.3 <= server.asked[1].at - refused[0] < 10
    if callable(value):
        assert server.asked[1].at - refused[0] >= 0.9


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "-3"}, 0),
        ({"retry-after": "nan", "x-ratelimit-reset-requests": "2s"}, 2),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0),
        ({"x-ratelimit-reset-requests": "1s"}, 1),
        ({"x-ratelimit-reset-requests": "6m0s"}, 360),
        ({"x-ratelimit-reset-tokens": "120ms"}, 0.12),
        ({"x-ratelimit-reset-tokens": "1h2m3.5s"}, 3723.5),
        ({"x-ratelimit-reset-tokens": "20"}, 20),
        ({"x-ratelimit-reset-requests": "1s", "x-ratelimit-reset-tokens": "4s"}, 4),
        ({"x-ratelimit-reset-requests": "1x"}, None),
    ],
)
def test_wait_hints(headers, seconds):
    assert wait_hint(headers, True) == (seconds if seconds is None else pytest.approx(seconds))


def test_other_refusals_ignore_rate_limits():
    assert wait_hint({"x-ratelimit-reset-tokens": "6m0s"}, False) is None


def test_an_unreasonable_wish_is_capped():
    with Server(then(Reply({}, 429, {"retry-after": "86400"}))) as server:
        collect(generator(server, max_delay=0.02), rows(1))
    assert len(server.asked) == 2


def test_too_many_requests_slow_all_down():
    together, refused = threading.Barrier(8), []

    def script(asked):
        if asked.number < 8:
            together.wait(10)
        if asked.number == 0:
            refused.append(time.monotonic())
            return Reply({"error": {"message": "slow down"}}, 429, {"retry-after-ms": "500"})
        reply = completion(asked)
        # Those in flight come back while the pause lasts
        return Reply(reply.body, after=0.2 if asked.number < 8 else 0.02)

    with Server(script) as server:
        found = collect(generator(server), rows(24))
    assert {c.error for c in found.values()} == {None}
    later = server.asked[8:]
    assert min(asked.at for asked in later) - refused[0] >= 0.5
    assert max(asked.in_flight for asked in later) < 8  # and then fewer at once
    assert max(asked.in_flight for asked in later) >= 3


def test_the_gate_halves_once_per_crowd_and_widens_again():
    gate = Gate(16)
    now = time.monotonic()
    for _ in range(10):  # sent together, refused together
        gate.narrow(0.0, now)
    assert gate.width == 8
    gate.narrow(0.0, time.monotonic())
    assert gate.width == 4
    for _ in range(60):
        gate.widen()
    assert 9 <= gate.width <= 10
    for _ in range(100):
        gate.widen()
    assert gate.width == 16
    for _ in range(20):
        gate.narrow(0.0, time.monotonic())
    assert gate.width == 1


# What stays


@pytest.mark.parametrize(
    ("status", "says"),
    [(401, "set OPENAI_API_KEY"), (403, "set OPENAI_API_KEY"), (404, "check that the url ends")],
)
def test_what_every_request_would_meet_ends_the_run(status, says):
    with Server(lambda asked: Reply({"error": {"message": f"no,\n{KEY} is wrong"}}, status)) as server:
        found, error = collect_until_error(generator(server, concurrency=4), rows(1000))
    assert found == [] and len(server.asked) <= 4
    text = str(error)
    assert text.startswith(f"{server.url}: HTTP {status}: no, [key] is wrong; ") and says in text and "'tiny'" in text


def test_a_spent_quota_ends_the_run():
    reply = Reply({"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}, 429)
    with Server(lambda asked: reply) as server:
        _, error = collect_until_error(generator(server, concurrency=2), rows(100))
    assert "raise the account's quota" in str(error) and len(server.asked) <= 2


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (400, {"error": {"message": "prompt has 9 tokens,\n  at most 8"}}, "HTTP 400: prompt has 9 tokens, at most 8"),
        (400, {"object": "error", "message": "too long", "code": 400}, "HTTP 400: too long"),
        (422, {"detail": [{"loc": ["body"], "msg": "wrong"}]}, 'HTTP 422: [{"loc": ["body"], "msg": "wrong"}]'),
        (413, b"too large", "HTTP 413: too large"),
        (400, b"y" * 5000, "HTTP 400: yyyyy"),
    ],
)
def test_a_refused_row_is_recorded_and_not_retried(status, body, says):
    with Server(lambda asked: Reply(body, status) if asked.prompt == "prompt1" else completion(asked)) as server:
        found = collect(generator(server), rows(3))
    assert found["row1"].error.startswith(says) and not found["row1"].samples
    assert "\n" not in found["row1"].error and len(found["row1"].error) < 400
    assert found["row0"].error is found["row2"].error is None and len(server.asked) == 3


def test_no_server():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    found, error = collect_until_error(generator(url, concurrency=4), rows(1000))
    assert found == []
    assert str(error).startswith(f"{url}: no answer in 6 attempts (connection failed: ")
    assert "start the server, or check the url" in str(error)


def test_a_server_that_never_answers_is_not_asked_for_each_row():
    with Server(lambda asked: Reply(cut="all")) as server:
        _, error = collect_until_error(generator(server, concurrency=4), rows(1000))
    assert "no answer in 6 attempts" in str(error) and 6 <= len(server.asked) <= 24
    with Server(lambda asked: Reply(after=30)) as server:
        _, error = collect_until_error(generator(server, concurrency=4, timeout=0.1), rows(1000))
    assert "no answer in 3 attempts (no answer within timeout=0.1 s)" in str(error) and len(server.asked) <= 12


def test_a_server_that_is_there_and_broken_gets_all_retries():
    with Server(lambda asked: Reply({"error": "engine is dead"}, 500)) as server:
        _, error = collect_until_error(generator(server, max_retries=7, max_failed_share=0.0), rows(2))
    assert "2 of 2 requests failed" in str(error) and "HTTP 500: engine is dead (8 attempts)" in str(error)
    assert len(server.asked) == 16


def test_too_large_a_share_of_failures_ends_the_run():
    def script(asked):
        if int(asked.prompt.removeprefix("prompt")) % 5:
            return completion(asked)
        return Reply({"error": {"message": f"{asked.prompt} is bad"}}, 400)

    with Server(script) as server:
        found, error = collect_until_error(generator(server, concurrency=1, max_failed_share=0.1), rows(100))
        assert [c.id for c in found] == [f"row{i}" for i in range(20)]  # what is there is given first
        assert str(error) == (
            f"{server.url}: 4 of 20 requests failed (20%, more than max_failed_share=0.1), 4 of them like this: "
            "HTTP 400: prompt0 is bad; mend that, or raise max_failed_share"
        )
        assert len(collect(generator(server, concurrency=1, max_failed_share=0.25), rows(100))) == 100
        # Fewer than 20: at the end
        found, error = collect_until_error(generator(server, concurrency=1, max_failed_share=0.1), rows(6))
        assert len(found) == 6 and "2 of 6 requests failed (33%" in str(error)


# All at once


def test_a_server_at_thirty_percent_faults():
    rng, lock, last = random.Random(0), threading.Lock(), {}
    faults = [
        Reply(b"z" * 500, cut="half"), Reply(cut="all"), Reply({}, 500), Reply({}, 503, {"retry-after-ms": "5"}),
        Reply({}, 429, {"retry-after-ms": "5"}), BROKEN, Reply({"choices": []}), Reply({}, 400), Reply({}, after=30),
    ]  # fmt: skip

    def script(asked):
        with lock:
            fault = rng.choice(faults) if rng.random() < 0.3 else None
            last[asked.prompt] = fault
        return fault or completion(asked)

    with Server(script) as server:
        endpoint = generator(server, concurrency=16, timeout=0.8, max_retries=3)
        found = collect(endpoint, rows(200), SamplingConfig(16, num_samples=2))
    assert set(found) == {f"row{i}" for i in range(200)}
    for i in range(200):
        completed = found[f"row{i}"]
        if last[f"prompt{i}"] is None:
            assert completed.error is None
            assert [s.text for s in completed.samples] == [f"prompt{i} -> 0", f"prompt{i} -> 1"]
        else:
            assert completed.error and not completed.samples
    failed = sum(fault is not None for fault in last.values())
    assert 1 <= failed <= 40 and len(server.asked) > 230


@pytest.mark.parametrize("concurrency", [1, 3, 32])
def test_concurrency_is_real_and_bounded(concurrency):
    together = threading.Barrier(concurrency)

    def script(asked):
        if asked.number < concurrency:
            together.wait(10)  # breaks, and the test fails, unless so many are there at once
        return Reply(completion(asked).body, after=0.01)

    with Server(script) as server:
        assert {c.error for c in collect(generator(server, concurrency=concurrency), rows(60)).values()} == {None}
    assert max(asked.in_flight for asked in server.asked) == concurrency


class Endless(Sequence):
    """A million requests, made when they are looked at."""

    def __init__(self):
        self.seen = 0

    def __len__(self):
        return 1_000_000

    def __getitem__(self, i):
        self.seen = max(self.seen, i + 1)
        return Request(f"row{i}", f"prompt{i}")


def test_a_slow_reader_holds_the_requests_back():
    requests = Endless()
    with Server() as server:
        batches = generator(server).generate(requests, SAMPLING)
        taken = len(next(batches))
        assert soon(lambda: requests.seen >= 16)
        time.sleep(0.3)
        assert requests.seen <= taken + 4 * 8
        while taken < 200:
            taken += len(next(batches))
        batches.close()


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="reads Linux's table of connections")
def test_closing_early_cancels_what_is_in_flight():
    before = client_threads()
    with Server(lambda asked: Reply(completion(asked).body, after=0 if asked.number < 4 else 60)) as server:
        batches = generator(server, timeout=60).generate(Endless(), SAMPLING)
        next(batches)
        assert soon(lambda: len(server.asked) == 12)
        assert "endpoint" in client_threads() and client_sockets(server.url) == 8
        start = time.monotonic()
        batches.close()
        assert time.monotonic() - start < 10 and "endpoint" not in client_threads()
        assert soon(lambda: server.hung_up == 8)  # the server sees it, and can stop generating
        assert soon(lambda: client_threads() == before)
        assert client_sockets(server.url) == 0
        assert list(batches) == []


@pytest.mark.parametrize("end", ["exhausted", "error"])
def test_nothing_is_left_behind(end):
    before = client_threads()
    with Server(lambda asked: completion(asked) if end == "exhausted" else Reply({}, 401)) as server:
        if end == "exhausted":
            collect(generator(server), rows(20))
        else:
            collect_until_error(generator(server), rows(20))
        assert soon(lambda: client_threads() == before)


def test_an_error_of_the_readers_closes():
    before = client_threads()
    with Server(lambda asked: Reply(completion(asked).body, after=0 if asked.number < 1 else 60)) as server:
        with pytest.raises(ZeroDivisionError):
            for _ in generator(server, timeout=60).generate(Endless(), SAMPLING):
                _ = 1 / 0
        assert soon(lambda: client_threads() == before)


def test_interrupt(repo_root):
    code = (
        "import signal, sys; from lm_jax.generation.endpoints import *; assert 'openai' not in sys.modules\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs are told to ignore it
        "rows = [Request(str(i), 'x') for i in range(100)]\n"
        "for batch in EndpointGenerator(sys.argv[1], 'tiny').generate(rows, SamplingConfig(4)): pass"
    )
    with Server(lambda asked: Reply(after=60)) as server:
        process = subprocess.Popen(
            [sys.executable, "-c", code, server.url], cwd=repo_root, stderr=subprocess.PIPE, text=True
        )
        assert soon(lambda: len(server.asked) == 64, 30)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
        assert "KeyboardInterrupt" in errors and process.returncode != 0
        assert soon(lambda: server.hung_up == 64)


# What is said


@pytest.mark.parametrize(
    "make",
    [
        lambda echo: Reply({"error": {"message": echo, "code": echo}}, 400),
        lambda echo: Reply({"error": {"message": echo}}, 401),
        lambda echo: Reply({"error": {"message": echo}}, 404),
        lambda echo: Reply({"error": {"message": echo}}, 429),
        lambda echo: Reply({"detail": [echo]}, 422),
        lambda echo: Reply({"error": echo}, 500),
        lambda echo: Reply(echo.encode(), 500, {"Content-Type": "text/plain", "X-Echo": echo}),
        lambda echo: Reply(b"." * 290 + echo.encode()),  # where a message is cut
        lambda echo: Reply({"choices": [], "echo": echo}),
        lambda echo: Reply({"choices": [{"text": "x", "finish_reason": echo}]}),
        lambda echo: Reply(echo.encode() * 9, cut="half"),
    ],
)
@pytest.mark.parametrize("key", [KEY, "sk-\"quote\\back'slash"])
def test_the_key_is_never_shown(monkeypatch, capfd, make, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with Server(lambda asked: make(f"you sent {asked.headers['authorization']} here")) as server:
        endpoint, shown = generator(server, max_retries=1, max_failed_share=0.0), []
        try:
            for batch in endpoint.generate(rows(3), SAMPLING):
                shown.append(repr(batch))
            raise AssertionError("no failure")
        except UserError as error:
            shown += [*traceback.format_exception(error), repr(error), repr(error.__context__), repr(error.__cause__)]
    assert server.asked[0].headers["authorization"] == f"Bearer {key}"
    shown += [repr(endpoint), repr(vars(endpoint)), *capfd.readouterr()]
    for part in (key, key[:8]):
        assert part not in "".join(shown).replace("\\\\", "\\").replace('\\"', '"')


@pytest.mark.parametrize("key", ["sk-new\nline", "sk-ümlaut"])
def test_a_key_that_no_header_can_carry(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY: has characters") as caught:
        generator("http://127.0.0.1:1/v1").generate(rows(1), SAMPLING)
    assert "sk-" not in str(caught.value)


def test_a_key_with_a_line_end_is_taken_without(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    with Server() as server:
        collect(generator(server), rows(1))
    assert server.asked[0].headers["authorization"] == f"Bearer {KEY}"


def test_trouble_is_said_once_in_a_while(capfd):
    with Server(then(Reply({"error": {"message": "busy"}}, 503), BROKEN)) as server:
        collect(generator(server), rows(30))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2  # 60 faults of two kinds
    assert lines[0].startswith(f"{server.url}: HTTP 503: busy; next attempt in 0.0 s")
    assert "no choices but: {" in lines[1]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"url": "localhost:8000/v1"}, "url: must be like http://host:8000/v1"),
        ({"url": f"http://user:{KEY}@host/v1"}, "url: must be like"),
        ({"url": f"http://host/v1?key={KEY}"}, "url: must be like"),
        ({"url": "http://host:port/v1"}, "url: must be like"),
        ({"url": None}, "url: must be like"),
        ({"model": ""}, "model=''"),
        ({"concurrency": 0}, "concurrency=0: must be 1 to 1000"),
        ({"concurrency": 1001}, "concurrency=1001"),
        ({"timeout": 0}, "timeout=0"),
        ({"connect_timeout": float("inf")}, "connect_timeout=inf"),
        ({"max_retries": -1}, "max_retries=-1"),
        ({"max_failed_share": 1.5}, "max_failed_share=1.5"),
        ({"base_delay": 0}, "base_delay=0"),
        ({"base_delay": 2, "max_delay": 1}, "max_delay=1"),
    ],
)
def test_settings_out_of_range(settings, says):
    with pytest.raises(UserError) as caught:
        EndpointGenerator(**{"url": "http://host:8000/v1", "model": "tiny"} | settings)
    assert says in str(caught.value) and KEY not in str(caught.value)


def test_what_a_chat_template_takes_besides():
    """The row's before the settings'; functions and arguments as the API has them."""
    call = {"function": {"name": "tide", "arguments": {"at": "Oslo"}}}
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    given = with_arguments(messages, {"tools": [{"type": "function"}], "enable_thinking": False})
    body = request_body(Request("r", given), SAMPLING, "tiny", 1, 0, {"enable_thinking": True, "depth": 2})
    assert body["extra_body"] == {"chat_template_kwargs": {"enable_thinking": False, "depth": 2}}
    assert body["tools"] == [{"type": "function"}] and body["messages"][0] == messages[0]
    assert body["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"at": "Oslo"}'
    plain = request_body(Request("r", "text"), SAMPLING, "tiny", 1, 0, {"enable_thinking": True})
    assert "extra_body" not in plain and plain["prompt"] == "text"
    assert "extra_body" not in request_body(Request("r", messages), SAMPLING, "tiny", 1, 0, {})


def test_arguments_of_the_settings_reach_the_server():
    kwargs = {"enable_thinking": False}
    asked = [Request("r", [{"role": "user", "content": "Hi"}])]
    with Server() as server:
        assert collect(generator(server, chat_template_kwargs=kwargs), asked)["r"].error is None
        assert server.asked[-1].body["chat_template_kwargs"] == kwargs
