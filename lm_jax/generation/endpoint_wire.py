"""What is said to an OpenAI-compatible server, and what its answers and refusals mean."""

import contextlib
import dataclasses
import email.utils
import hashlib
import json
import math
import re
import time
from collections.abc import Mapping
from typing import Any

from lm_jax.data.messages import (
    TEMPLATE_KWARGS,
    TOOLS,
    Text,
    map_call_arguments,
    messages_fault,
    split_arguments,
)
from lm_jax.generation.requests import Request, Sample, SamplingConfig

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclasses.dataclass(frozen=True)
class Fault:
    """Why there is no answer.

    Attributes:
      kind: few different ones, to count by.
      message: one sentence; what comes from the server in it is as the server wrote it.
      reach: "retry" (may pass), "row" (this request cannot be answered) or "run" (none can).
      hint: seconds that the server asks to wait, or None.
    """

    kind: str
    message: str
    reach: str = "retry"
    hint: float | None = None


def prompt_problem(prompt: Text) -> str | None:
    """What no server should be asked, or None."""
    if isinstance(prompt, str):
        if not prompt.strip():
            return "the prompt is empty; give a text"
    elif fault := messages_fault(prompt):
        return f"prompt {fault}; give a string or a list of {{'role': ..., 'content': ...}}"
    try:
        json.dumps(prompt, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "the prompt holds half a surrogate pair, which is no character; remove it"
    except (TypeError, ValueError):
        return "the prompt's messages hold what JSON cannot; give strings"
    return None


def _seed(sampling: SamplingConfig, request_id: str, first: int) -> int:
    """For the samples from `first` on: the same in any order of requests, and within 31 bits, as every server takes.

    vLLM adds 0, 1, ... for the samples of one request: those asked for later start from an unrelated number.
    """
    digest = hashlib.sha256(f"{sampling.seed} {first} {request_id}".encode(errors="surrogatepass")).digest()
    return 1 + int.from_bytes(digest[:8], "big") % (2**31 - 2**16)


def request_body(
    request: Request,
    sampling: SamplingConfig,
    model: str,
    n: int,
    first: int,
    chat_template_kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """What the client's `create` is called with; `extra_body` are names that vLLM and SGLang share."""
    kwargs: dict[str, Any] = {}
    prompt: Any = request.prompt
    if chat := isinstance(prompt, list):
        own, messages = split_arguments(prompt)
        kwargs, prompt = {**chat_template_kwargs, **own}, map_call_arguments(messages, _as_json)
    tools = kwargs.pop(TOOLS, None)
    texts = [stop for stop in sampling.stop if isinstance(stop, str)]
    ids = [stop for stop in sampling.stop if not isinstance(stop, str)]
    extra = {
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": 0 if sampling.repetition_penalty == 1 else sampling.repetition_penalty,
        "stop_token_ids": ids,
        TEMPLATE_KWARGS: kwargs,
    }
    body: dict[str, Any] = {
        "model": model,
        "messages" if chat else "prompt": prompt,
        "n": n,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": min(request.max_new_tokens or sampling.max_new_tokens, sampling.max_new_tokens),
        "seed": _seed(sampling, request.id, first),
    }
    if tools:
        body[TOOLS] = tools
    if texts:
        body["stop"] = texts
    if extra := {name: value for name, value in extra.items() if value}:  # 0 and none are off
        body["extra_body"] = extra
    return body


def _as_json(arguments: Any) -> str:
    """The API takes a call's arguments as a string."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def read_samples(content: bytes, chat: bool) -> list[Sample] | Fault:
    """The choices in a response's body, at least one, or why they cannot be kept."""
    try:
        answer = json.loads(content)
        choices = [((c["message"]["content"] if chat else c["text"]), c["finish_reason"]) for c in answer["choices"]]
        tokens = (answer.get("usage") or {}).get("completion_tokens")
        if not choices or not all(isinstance(text, str | None) for text, _ in choices):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        text = content.decode(errors="replace").strip() or "nothing"
        return Fault("broken answer", f"the answer holds no choices but: {text}")
    for text, reason in choices:
        if reason == "abort":  # a server that is shutting down says so
            return Fault("abort", "the server broke off (finish_reason 'abort')")
        if reason not in ("stop", "length"):
            return Fault("finish_reason", f"the server ended with finish_reason {reason!r}", "row")
        if text is None:
            say = f"the answer has reasoning and no text (finish_reason {reason!r}); raise max_new_tokens"
            return Fault("no text", say, "row")
    # The usage is of all choices together
    exact = len(choices) == 1 and isinstance(tokens, int) and tokens >= 0
    return [Sample(text, reason, tokens if exact else None) for text, reason in choices]


def server_message(error) -> str:
    """What a refusal says, in any of the shapes that servers use."""
    body = error.body
    for name in ("error", "message", "detail"):
        if isinstance(body, Mapping) and body.get(name):
            body = body[name]
    return body if isinstance(body, str) else json.dumps(body, default=str) if body else error.response.text


def wait_hint(headers: Mapping[str, str], rate_limits: bool) -> float | None:
    """Seconds that a refusal's headers ask to wait, or None.

    Args:
      headers: of the response.
      rate_limits: whether the time until a rate limit is reset counts; many servers send it with every response.
    """
    with contextlib.suppress(KeyError, ValueError):
        return _seconds(float(headers["retry-after-ms"]) / 1000)
    with contextlib.suppress(KeyError, ValueError):
        return _seconds(float(headers["retry-after"]))
    with contextlib.suppress(KeyError, ValueError, TypeError):
        return _seconds(email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    resets = []
    for name in ("x-ratelimit-reset-requests", "x-ratelimit-reset-tokens") if rate_limits else ():
        text = headers.get(name, "").strip()
        if re.fullmatch(r"(\d+(\.\d+)?(ms|s|m|h|d))+", text):
            resets.append(sum(float(n) * _UNITS[unit] for n, unit in re.findall(r"([\d.]+)(ms|s|m|h|d)", text)))
        elif re.fullmatch(r"\d+(\.\d+)?", text):
            resets.append(float(text))
    return max(resets, default=None)


def _seconds(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("no time")
    return max(0.0, value)
