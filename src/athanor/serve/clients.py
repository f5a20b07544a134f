"""The clients of a load test: each streams an answer from a server that speaks OpenAI's dialect, and notes when what came."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from athanor.core.errors import AthanorError, ConfigError, MissingExtraError
from athanor.serve.load import Ask, Load, Mix, Outcome, Result, plan

if TYPE_CHECKING:
    import httpx

# Frequent and short: close to one token each in most vocabularies; `_Ruler` measures how many they really are.
WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand part"
    " place case week company system program question work number night point home water room mother area money story fact"
    " month lot right study book eye job word business issue side kind head house service friend father power hour game line"
    " end member law car city name team minute idea body back parent face level office door health person art war history"
)
_SHORT = 4  # words of the shortest prompt that tokens a word are measured with


class LoadError(AthanorError):
    """The server cannot be measured at all. `status` is that of its answer, where it was one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def base_of(url: str) -> str:
    """Where a server's routes lie: `url`, with /v1 where it has no path. Raises ConfigError for what is no HTTP address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"url ({url!r}) must be an HTTP address: give one such as http://127.0.0.1:8000/v1")
    return url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")


async def measure(
    url: str,
    load: Load,
    mix: Mix,
    *,
    model: str | None = None,
    key: str | None = None,
    progress: Callable[[Mapping[str, Any]], None] = lambda record: None,
) -> Result:
    """Put `load` on the server at `url` and watch.

    Args:
        url: base of its routes, such as http://127.0.0.1:8000/v1.
        model: of those it serves; by default the first.
        key: sent as bearer token.
        progress: called when a request is over, with how many are ("step"), and how many are in flight.

    Raises:
        ConfigError: a value out of range. LoadError: the server does not answer even one request alone.
    """
    load.check()
    mix.check()
    import_extra()
    import httpx

    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=load.clients)
    async with httpx.AsyncClient(base_url=base_of(url), headers=headers, timeout=load.timeout, limits=limits) as http:
        model = await _first_model(http) if model is None else model
        ruler = await _Ruler.of(http, model, mix.prompt[1])
        clients = _Clients(http, model, mix, ruler, progress)
        return await clients.run(load, plan(load, mix))


def import_extra() -> None:
    """Raises MissingExtraError where what speaks HTTP is not installed."""
    try:
        import httpx_sse  # noqa: F401  # only whether it is there
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "the load is made by httpx and httpx-sse, which are not installed: pip install 'athanor-lm[bench]'"
        ) from error


async def _json(http: httpx.AsyncClient, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """The answer to one request alone. Raises LoadError, saying what is wrong with it."""
    import httpx

    where = f"{http.base_url}{path}"
    try:
        response = await (http.get(path) if body is None else http.post(path, json=body))
        found = response.json() if response.is_success else None
    except httpx.HTTPError as error:
        raise LoadError(
            f"{where} does not answer ({type(error).__name__}: {error}): check the address, or start the server"
        ) from error
    except ValueError as error:
        raise LoadError(f"{where} does not answer in JSON: is it an OpenAI-compatible server?") from error
    if found is None:
        hint = "; the key is taken from OPENAI_API_KEY" if response.status_code == 401 else ""
        raise LoadError(f"{where} answers {response.status_code}: {_said(response.text)}{hint}", response.status_code)
    return found


async def _first_model(http: httpx.AsyncClient) -> str:
    found = await _json(http, "models")
    try:
        return str(found["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as error:
        raise LoadError(f"{http.base_url}models names no model: give one with --model") from error


@dataclass(frozen=True, slots=True)
class _Ruler:
    """How many tokens the server counts in a prompt: `fixed` of its template, and `each` for a word."""

    fixed: float
    each: float

    @classmethod
    async def of(cls, http: httpx.AsyncClient, model: str, longest: int) -> _Ruler:
        """Measured with two requests, which warm the server up, too: one of `longest` words, or as many as it takes."""
        words = max(2 * _SHORT, longest)
        while True:
            try:
                many = await cls._count(http, model, words)
                break
            except LoadError as error:
                if error.status != 400 or words == 2 * _SHORT:
                    raise
                words = max(2 * _SHORT, words // 2)  # a word is several tokens, and the context is short
        few = await cls._count(http, model, _SHORT)
        if many <= few:
            raise LoadError(f"the server counts {few} and {many} tokens in {_SHORT} and {words} words: it cannot be measured")
        each = (many - few) / (words - _SHORT)
        return cls(few - each * _SHORT, each)

    @staticmethod
    async def _count(http: httpx.AsyncClient, model: str, words: int) -> int:
        found = await _json(http, "chat/completions", _body(model, _text(words, random.Random(words)), 1, 0.0))
        try:
            return int(found["usage"]["prompt_tokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise LoadError(f"{http.base_url}chat/completions tells no usage: prompts cannot be made to measure") from error

    def prompt(self, tokens: int, seed: int) -> str:
        """A text that makes a prompt of about `tokens` tokens."""
        return _text(max(1, round((tokens - self.fixed) / self.each)), random.Random(seed))


def _text(words: int, draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS.split(), k=words))


def _body(model: str, prompt: str, max_tokens: int, temperature: float) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": temperature}


class _Clients:
    """Those who ask, each in a task of its own."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        model: str,
        mix: Mix,
        ruler: _Ruler,
        progress: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._http, self._mix, self._ruler, self._progress = http, mix, ruler, progress
        self._result = Result(model)
        self._over, self._failed = 0, 0
        self._began = 0.0

    def _now(self) -> float:
        return time.perf_counter() - self._began

    async def run(self, load: Load, asks: Sequence[Ask]) -> Result:
        free = asyncio.Semaphore(load.clients)
        tasks: list[asyncio.Task[None]] = []
        self._began = time.perf_counter()
        try:
            for i, ask in enumerate(asks):
                await asyncio.sleep(max(0.0, ask.at - self._now()))
                await free.acquire()
                if load.seconds is not None and self._now() > load.seconds:
                    self._result.unsent = len(asks) - i
                    break
                planned = ask.at if load.rate is not None else self._now()
                tasks.append(asyncio.create_task(self._client(ask, planned, free)))
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return self._result

    async def _client(self, ask: Ask, planned: float, free: asyncio.Semaphore) -> None:
        body = _body(self._result.model, self._ruler.prompt(ask.prompt, ask.seed), ask.output, self._mix.temperature)
        body |= {"stream": True, "stream_options": {"include_usage": True}, "seed": ask.seed}
        if self._mix.ignore_eos:
            body["ignore_eos"] = True
        outcome = Outcome(planned, self._now())
        self._result.outcomes.append(outcome)
        try:
            outcome.error, outcome.message = await self._listen(body, ask, outcome)
        finally:
            outcome.ended = self._now()
            free.release()
        self._over += 1
        self._failed += bool(outcome.error)
        in_flight = len(self._result.outcomes) - self._over
        self._progress({"step": self._over, "in flight": in_flight} | ({"failed": self._failed} if self._failed else {}))

    async def _listen(self, body: Mapping[str, Any], ask: Ask, outcome: Outcome) -> tuple[str, str]:
        """Read the answer; the kind of error and its message, or two empty texts."""
        import httpx
        from httpx_sse import EventSource, SSEError

        try:
            async with self._http.stream("POST", "chat/completions", json=body) as response:
                if not response.is_success:
                    return f"HTTP {response.status_code}", _said((await response.aread()).decode(errors="replace"))
                async with contextlib.aclosing(EventSource(response).aiter_sse()) as events:
                    async for event in events:
                        if event.data == "[DONE]":
                            return "", ""
                        found = json.loads(event.data)
                        if "error" in found:
                            return f"error event {_code(found['error'])}".strip(), _said(event.data)
                        self._note(found, outcome)
                        if ask.leave is not None and outcome.tokens >= ask.leave:
                            outcome.left = True
                            return "", ""
        except httpx.TimeoutException as error:
            return "timeout", type(error).__name__
        except httpx.ConnectError as error:
            return "no connection", str(error)
        except (httpx.HTTPError, SSEError, ValueError, TypeError, KeyError, AttributeError) as error:
            return "broken stream", f"{type(error).__name__}: {error}"[:200]
        return "broken stream", "it ended before [DONE]"

    def _note(self, event: Mapping[str, Any], outcome: Outcome) -> None:
        for choice in event["choices"]:
            outcome.finish = choice.get("finish_reason") or outcome.finish
            delta = choice["delta"]
            if any(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls")):
                outcome.last = self._now()
                if outcome.first is None:
                    outcome.first = outcome.last
                outcome.tokens += 1
        if usage := event.get("usage"):
            outcome.prompt_tokens, outcome.tokens = usage["prompt_tokens"], usage["completion_tokens"]


def _code(error: object) -> str:
    return str(error.get("code") or error.get("type") or "") if isinstance(error, dict) else ""


def _said(body: str) -> str:
    """The message in an error's body, or the body, short."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        body = json.loads(body)["error"]["message"]
    return " ".join(str(body).split())[:200]
