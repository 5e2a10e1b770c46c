"""One request's answer: from the engine's tokens to settled text, choices and server-sent events.

Knows nothing of addresses, keys or the application; when its reader leaves, it stops the engine's work.

Shape letters, in words: `experts` is [MoE layer][k].
"""

import asyncio
import json
import math
from collections.abc import AsyncIterator
from contextlib import aclosing
from itertools import accumulate
from typing import Any

from fastapi import Request

from dsl.engine import Engine, Full, Job
from dsl.generation import Token
from dsl.wire import CompletionBody, Refused, problem_of


def as_refusal(error: Exception) -> Refused:
    if isinstance(error, Full):
        return Refused(503, f"{error}, try again later", **{"Retry-After": "2"})
    if isinstance(error, ValueError):  # of `generate`: opens with the field's name
        return Refused(422, str(error).splitlines()[0], str(error).split()[0])
    return Refused(500, str(error))


class Answer:
    """One request's tokens as they come: text without what follows a stop text, counts, and why it ended."""

    def __init__(self, engine: Engine, request: Request, sampling: dict[str, Any], stops: tuple[str, ...] = ()):
        self.engine, self.request, self.stops = engine, request, stops
        self.job = Job(sampling, engine.limits.seconds)
        self.prompt_tokens, self.new, self.held, self.finish = 0, 0, "", ""

    async def _watch(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.job.stop.set()

    async def pieces(self) -> AsyncIterator[tuple[str, list[Token]]]:
        """Text that is settled and the tokens it came with. Raises Refused; ends with `finish` set."""
        try:
            self.engine.submit(self.job)
        except Full as full:
            raise as_refusal(full) from None
        watch, self.finish = asyncio.create_task(self._watch()), "length"
        try:
            while (item := await self.job.items.get()) is not None:
                if isinstance(item, Exception):
                    raise as_refusal(item)
                self.prompt_tokens, self.new = self.prompt_tokens or item.position, self.new + 1
                yield self._settled(item.text), [item]
                if self.finish == "stop":
                    return
                if item.id in self.engine.ends:
                    self.finish = "stop"
            if self.held:
                yield self.held, []
        finally:
            watch.cancel()
            self.job.stop.set()

    def _settled(self, piece: str) -> str:
        self.held += piece
        if found := [at for stop in self.stops if (at := self.held.find(stop)) >= 0]:
            self.finish, text, self.held = "stop", self.held[: min(found)], ""
            return text
        ends = (n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n]))
        sure = len(self.held) - max(ends, default=0)  # what follows may be the beginning of a stop text
        text, self.held = self.held[:sure], self.held[sure:]
        return text

    @property
    def usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.new
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.new, "total_tokens": total}


def choice_of(body: CompletionBody, text: str, tokens: list[Token], finish: str | None, offset: int) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    if body.logprobs is not None:
        rows = ([(t.text, t.probability), *(r[1:] for r in t.runners_up)] for t in tokens)
        likely = (sorted(row, key=lambda each: -each[1])[: body.logprobs] for row in rows)
        choice["logprobs"] = {
            "tokens": [t.text for t in tokens],
            "token_logprobs": [_log(t.probability) for t in tokens],
            "top_logprobs": [{text: _log(p) for text, p in row} for row in likely],
            "text_offset": [*accumulate((len(t.text) for t in tokens), initial=offset)][:-1],
        }
    if body.routing:
        choice["routing"] = [
            {"text": t.text, "probability": t.probability, "experts": t.experts.tolist(), "state_bytes": t.state_bytes}
            for t in tokens
        ]
    return choice


def _log(probability: float) -> float:
    return math.log(max(probability, 1e-30))


async def chunks(answer: Answer, body: CompletionBody, before: str, head: dict[str, Any]) -> AsyncIterator[str]:
    offset = len(before)
    async with aclosing(answer.pieces()) as pieces:
        async for piece, tokens in pieces:
            choice = choice_of(body, before + piece, tokens, None, offset)
            before, offset = "", offset + sum(len(token.text) for token in tokens)  # a piece may be held back
            yield json.dumps({**head, "choices": [choice]})
    yield json.dumps({**head, "choices": [choice_of(body, before, [], answer.finish, offset)]})
    if (body.stream_options or {}).get("include_usage"):
        yield json.dumps({**head, "choices": [], "usage": answer.usage})


async def events(first: str, chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    async with aclosing(chunks):
        try:
            yield f"data: {first}\n\n"
            async for chunk in chunks:
                yield f"data: {chunk}\n\n"
        except Refused as refused:  # too late for a status
            yield f"data: {json.dumps(problem_of(refused.detail, refused.status_code))}\n\n"
        yield "data: [DONE]\n\n"
