"""A small server of two scripted models that speaks OpenAI's dialect, for tests of what talks to one."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from athanor.serve import guard

MODELS = ("first/rl", "first/sft")
ESSAY = """The furnace keeps one steady heat, so every stage starts where the last one ended.

```python
def heat(stage: int) -> float:
    return 1.5 * stage  # degrees, and a line so long that it has to be scrolled on any screen there is today
```

Call `heat(2)` and you get 3.0."""


class Talker:
    """What it was asked, who left, and the application.

    The last message decides, or what `turns` still holds: "endless" is answered until the client leaves, "hang" with nothing
    until then, "refuse" with a 400, "break" breaks off in the middle, "garbage" is no JSON, "fail" sends an error event, "silent"
    finishes without a word, "html" says markup; all else is thought over and answered by ESSAY, with how often the model was
    asked before it.
    """

    def __init__(self, key: str | None = None, models: tuple[str, ...] = MODELS, pause: float = 0.0) -> None:
        self.key, self.models, self.pause = key, models, pause
        self.asked: list[dict[str, Any]] = []
        self.left = 0
        self.turns: list[str] = []
        self.running, self.most = 0, 0
        self.times: Counter[str] = Counter()
        self.app = FastAPI()
        guard.install(self.app)
        self.app.get("/v1/models")(self._models)
        self.app.post("/v1/chat/completions")(self._chat)

    def _barred(self, request: Request) -> JSONResponse | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": "the key is missing or wrong"}}, 401)

    async def _models(self, request: Request) -> JSONResponse:
        return self._barred(request) or JSONResponse({"data": [{"id": name} for name in self.models]})

    async def _chat(self, request: Request) -> Any:
        if barred := self._barred(request):
            return barred
        body = await request.json()
        self.asked.append(body)
        self.times[body["model"]] += 1
        said = self.turns.pop(0) if self.turns and body.get("stream") else body["messages"][-1]["content"]
        if said == "refuse":
            return JSONResponse({"error": {"message": "this is refused", "code": "no"}}, 400)
        if not body.get("stream"):
            usage = {"prompt_tokens": self.tokens(body), "completion_tokens": 1}
            return JSONResponse({"choices": [{"message": {"content": "x"}, "finish_reason": "length"}], "usage": usage})
        return StreamingResponse(self._stream(body, said), media_type="text/event-stream")

    @staticmethod
    def tokens(body: dict[str, Any]) -> int:
        """Of the prompt: three for each word and seven more."""
        return 7 + 3 * sum(len(message["content"].split()) for message in body["messages"])

    async def _stream(self, body: dict[str, Any], said: str) -> AsyncIterator[str]:
        self.running += 1
        self.most = max(self.most, self.running)
        finished = False
        try:
            yield _event({"role": "assistant", "content": ""})
            if said == "hang":
                await asyncio.Event().wait()
            count = 0
            for delta in self._deltas(body, said):
                await asyncio.sleep(0.002 if said == "endless" else self.pause)
                yield _event(delta)
                count += 1
                if count == body.get("max_tokens"):
                    break
                if said in ("break", "fail", "garbage") and count == 3:
                    if said == "fail":
                        yield "data: " + json.dumps({"error": {"message": "it went wrong", "code": "internal_error"}}) + "\n\n"
                    if said == "garbage":
                        yield "data: {\n\n"
                    finished = True
                    return
            yield ": ping\n\n" + _event({}, "length" if count == body.get("max_tokens") else "stop")
            if (body.get("stream_options") or {}).get("include_usage"):
                usage = {"prompt_tokens": self.tokens(body), "completion_tokens": count}
                yield "data: " + json.dumps({"choices": [], "usage": usage}) + "\r\n\r\n"
            finished = True
            yield "data: [DONE]\n\n"
        finally:
            self.running -= 1
            self.left += not finished

    def _deltas(self, body: dict[str, Any], said: str) -> Any:
        if said == "silent":
            return
        if said == "html":
            said = "<img src=x onerror=\"document.title='broken into'\"><b>bold</b>"
            yield from ({"content": said}, {"content": "\n```\n</code><script>document.title='broken into'</script>\n```"})
            return
        if said == "endless":
            while True:
                yield {"content": "on "}
        for word in ["First", "I", "think", "about", "it,", "for", "a", "while."]:
            yield {"reasoning_content": word + " "}
        text = f"{ESSAY} This is answer {self.times[body['model']]} of {body['model']}."
        for i in range(0, len(text), 4):
            yield {"content": text[i : i + 4]}


def _event(delta: dict[str, str], finish: str | None = None) -> str:
    return "data: " + json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}) + "\n\n"
