"""The forms of the REST API: what a request may hold, with its limits, and how an error looks.

Knows nothing of models or of serving; FastAPI writes the OpenAPI document from these classes.
"""

from typing import Annotated, Any

from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as AnyHTTPException

LONGEST = 4096  # tokens of a request
Text = Annotated[str, Field(min_length=1, max_length=100)]


class Body(BaseModel):
    """What both requests share. An unknown name is an error; null is the default where OpenAI's clients send it."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    prompt: str = Field(max_length=20_000, description="text to continue")
    temperature: float | None = Field(1.0, ge=0, le=100, description="0 takes the likeliest token")
    top_p: float | None = Field(1.0, gt=0, le=1, description="sample from the likeliest that sum to this")
    top_k: int | None = Field(None, ge=1, le=2**31, description="sample from so many of the likeliest")
    repetition_penalty: float | None = Field(1.0, ge=0.01, le=100, description="above 1: repeat less")
    seed: int | None = Field(None, ge=0, lt=2**63, description="makes sampling repeatable")

    def sampling(self, max_new_tokens: int) -> dict[str, Any]:
        given = self.model_dump(include=set(Body.model_fields), exclude_none=True)
        return {**given, "max_new_tokens": max_new_tokens}


class GenerateBody(Body):
    max_length: int = Field(100, ge=1, le=LONGEST, description="most tokens, those of the prompt included")


class CompletionBody(Body):
    model: str | None = Field(None, description="as /v1/models names it")
    max_tokens: int | None = Field(16, ge=1, le=LONGEST, description="most new tokens")
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = Field(
        None, description="texts at which to end; they are left out"
    )
    stream: bool | None = False
    stream_options: dict[str, bool] | None = Field(None, description="include_usage")
    logprobs: int | None = Field(None, ge=0, le=5, description="so many of the likeliest beside each token")
    routing: bool = Field(False, description="ours: probability and experts [layer][k] of each token")
    echo: bool | None = Field(False, description="begin with the prompt")
    user: str | None = Field(None, description="ignored")
    n: int | None = Field(1, ge=1, le=1)
    best_of: int | None = Field(1, ge=1, le=1)
    presence_penalty: float | None = Field(0.0, ge=0, le=0)
    frequency_penalty: float | None = Field(0.0, ge=0, le=0)


class Generated(BaseModel):
    generated_text: str


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Problem(BaseModel):
    error: Error


class Refused(HTTPException):
    """An answer that is no success, and the field that is wrong."""

    def __init__(self, status: int, message: str, field: str | None = None, **headers: str):
        super().__init__(status, message.encode("utf-8", "replace").decode(), headers or None)
        self.field = field


def problem_of(message: str, status: int, field: str | None = None) -> dict[str, Any]:
    kind = {401: "authentication_error", 500: "server_error", 503: "overloaded"}.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": field, "code": None}}


def refusal(_: Any, error: AnyHTTPException) -> JSONResponse:
    answer = problem_of(str(error.detail), error.status_code, getattr(error, "field", None))
    return JSONResponse(answer, error.status_code, error.headers)


def invalid(_: Any, error: RequestValidationError) -> JSONResponse:
    """Every wrong field in one sentence; what was given is not repeated."""
    places = [
        ("body" if e["type"] == "json_invalid" else ".".join(map(str, e["loc"][1:])) or "body", e["msg"])
        for e in error.errors()  # where the JSON is broken, loc is a position in it
    ]
    field = places[0][0].encode("utf-8", "replace").decode()
    return refusal(None, Refused(422, "; ".join(f"{place}: {what}" for place, what in places)[:2000], field[:200]))
