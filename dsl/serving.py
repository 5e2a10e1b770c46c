"""The REST API over one loaded checkpoint: /generate, OpenAI's /v1/completions and /v1/models, /health.

Prompts, paths and keys are neither logged nor sent. The forms of requests and errors are in `wire`, whose turn it is
in `engine`.
"""

import asyncio
import hmac
import logging
import os
import sys
import time
import uuid
from contextlib import aclosing, asynccontextmanager
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from dsl import answers, hub, settings
from dsl.address import in_url, key_for, listen
from dsl.engine import Engine, Full, Limits
from dsl.wire import CompletionBody, GenerateBody, Generated, Problem, Refused, invalid, refusal

logger = logging.getLogger(__name__)
LIMITS = Limits()
GRACE = 4  # seconds that running requests have after a signal


class Guard:
    """Around the whole application: asks for the key, bounds requests and bodies, and is the last door for errors."""

    def __init__(self, app, key: str | None, limits: Limits):
        self.app, self.wanted, self.limits, self.inside = app, f"Bearer {key}".encode() if key else None, limits, 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        size, started, is_open = 0, False, scope["path"] == "/health"

        async def bounded():
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.limits.body:
                raise Refused(413, f"a request must have at most {self.limits.body} bytes")
            return message

        async def sending(message):
            nonlocal started
            started = True
            await send(message)

        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        self.inside += 1
        try:
            if self.inside > self.limits.inside and not is_open:
                raise answers.as_refusal(Full("the server has no room for more requests"))
            if self.wanted and not is_open and not hmac.compare_digest(given, self.wanted):
                rule = "this server asks for its key, as Authorization: Bearer KEY"
                raise Refused(401, rule, **{"WWW-Authenticate": "Bearer"})
            await self.app(scope, bounded, sending)
        except Exception as error:
            if not isinstance(error, Refused):
                logger.error("a request failed: %s", type(error).__name__)
                error = Refused(500, "the server failed on this request")
            if not started:
                await refusal(None, error)(scope, receive, send)
        finally:
            self.inside -= 1


def create_app(model, tokenizer, name: str, *, key: str | None = None, limits: Limits = LIMITS) -> FastAPI:
    """The application around a model in eval mode, which the API calls `name`; with a key, only /health is open."""
    engine = Engine(model, tokenizer, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        engine.start()
        yield
        engine.close()

    errors = {status: {"model": Problem} for status in (400, 401, 404, 413, 422, 500, 503)}
    app = FastAPI(title="dsl", lifespan=lifespan, docs_url=None, redoc_url=None, responses=errors)
    app.add_middleware(Guard, key=key, limits=limits)
    app.add_exception_handler(HTTPException, refusal)
    app.add_exception_handler(RequestValidationError, invalid)
    app.state.engine = engine
    blocks = model.model.moe_blocks
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "local"}
    card |= {"moe_layers": [b.layer_index for b in blocks], "num_experts": model.config.num_experts if blocks else 0}

    @app.get("/health")
    def health() -> JSONResponse:
        ready = engine.is_alive()
        counts = {"running": len(engine.running), "waiting": len(engine.waiting)}
        return JSONResponse({"live": True, "ready": ready, **counts}, 200 if ready else 503)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.post("/generate")
    async def generate(body: GenerateBody, request: Request) -> Generated:
        """The prompt and what the model adds to it."""
        # only the engine counts the prompt's tokens: it may add max_length, and what goes beyond is cut by position
        answer, text = answers.Answer(engine, request, body.sampling(body.max_length)), body.prompt
        async with aclosing(answer.pieces()) as pieces:
            async for piece, tokens in pieces:
                position = tokens[0].position if tokens else 0
                if position >= body.max_length:
                    rule = f"max_length must be more than the prompt's {position} tokens, got {body.max_length}"
                    raise Refused(422, rule, "max_length")
                text += piece
                if position == body.max_length - 1:
                    break
        return Generated(generated_text=text)

    @app.post("/v1/completions", responses={200: {"content": {"application/json": {}, "text/event-stream": {}}}})
    async def completions(body: CompletionBody, request: Request) -> Response:
        """OpenAI's text completion, whole or as server-sent events."""
        if body.model not in (None, name):
            raise Refused(404, f"the model {body.model!r:.80} does not exist, this server has {name!r}", "model")
        stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        answer = answers.Answer(engine, request, body.sampling(body.max_tokens or 16), stops)
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "model": name}
        head["created"] = int(time.time())
        before = body.prompt if body.echo else ""
        if body.stream:
            parts = answers.chunks(answer, body, before, head)
            first = await anext(parts)  # an error before it is an error of HTTP
            return StreamingResponse(answers.events(first, parts), media_type="text/event-stream")
        text, all_tokens = before, []
        async for piece, tokens in answer.pieces():
            text, all_tokens = text + piece, all_tokens + tokens
        choice = answers.choice_of(body, text, all_tokens, answer.finish, len(before))
        return JSONResponse({**head, "choices": [choice], "usage": answer.usage})

    return app


class Server(uvicorn.Server):
    """One that tells running requests that it ends, before uvicorn cuts them off."""

    async def shutdown(self, sockets=None) -> None:
        asyncio.get_running_loop().call_later(GRACE, self.config.app.state.engine.close)
        await super().shutdown(sockets)


def name_of(source: str) -> str:
    """What the API calls a checkpoint: the run's name, a step's run and step, a folder's last part, or the hub id."""
    place = settings.find_run(source)
    if place is None:
        return source
    place = place.resolve()
    return f"{place.parent.name}/{place.name}" if place.name.startswith("step-") else place.name


def serve(source: str, host: str, port: int, published: str | None = None) -> None:
    """Load a checkpoint and answer until a signal. Raises SettingsError, OSError, CheckpointError."""
    key = key_for(host, published)
    with listen(host, port) as door:
        model, tokenizer = hub.load(source)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        if "OMP_NUM_THREADS" not in os.environ:  # a core for HTTP: when all compute, each waits for the one held up
            torch.set_num_threads(max(1, torch.get_num_threads() - 1))
        app = create_app(model, tokenizer, name_of(source), key=key)
        quiet = {"log_level": "warning", "server_header": False, "access_log": False}
        config = uvicorn.Config(app, ws="none", timeout_graceful_shutdown=GRACE + 3, **quiet)
        url = f"http://{in_url(host)}:{door.getsockname()[1]}"
        print(f"dsl: {name_of(source)} answers on {url}", file=sys.stderr, flush=True)
        Server(config).run(sockets=[door])
