"""Requests, answers and errors as OpenAI's API has them.

A field that is null counts as not given. One that the server does not know is an error. A field that would change the
answer, but is not supported, may only have the value that changes nothing: many clients always send it.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired, TypedDict, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..core.data.messages import RowError, ToolCall
from ..errors import SlimtuneError, format_names, is_out_of_memory, suggest
from ..extras.message_parsing import decode_json_without_duplicate_keys
from ..generation.answer_queue import GenerationThreadEnded, QueueFull, ServerClosing, TokenLogprob
from .served_models import ServedModel

MAX_ANSWERS, MAX_LOGPROBS, MAX_STOPS, MAX_STOP_LENGTH, MAX_PROMPTS = 16, 20, 4, 256, 16


class ApiErrorFields(TypedDict):
    """What is wrong, in the body of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ApiErrorBody(TypedDict):
    """The body of an error."""

    error: ApiErrorFields


class TokenLogprobFields(TypedDict):
    """A token of a chat's answer, and its log p."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobEntry(TokenLogprobFields):
    """A token that was sampled, beside the likeliest ones."""

    top_logprobs: list[TokenLogprobFields]


class ChatLogprobs(TypedDict):
    """`logprobs` of a choice of a chat."""

    content: list[TokenLogprobEntry]
    refusal: None


class CompletionLogprobs(TypedDict):
    """`logprobs` of a choice of a completion: a list entry for each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class ChatAnswerFields(TypedDict):
    """The assistant's message in a finished answer."""

    role: str
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCall]]


class ChatChoiceFields(TypedDict):
    """A finished answer of a chat."""

    index: int
    message: ChatAnswerFields
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ToolCallDelta(ToolCall):
    """A tool call in a stream, and its number in the answer."""

    index: int


class ChatDelta(TypedDict, total=False):
    """What a part of a stream adds to the message."""

    role: str
    content: str
    tool_calls: list[ToolCallDelta]


class ChatChunkFields(TypedDict):
    """What a part of a stream says of an answer of a chat."""

    index: int
    delta: ChatDelta
    logprobs: NotRequired[ChatLogprobs | None]
    finish_reason: str | None


class CompletionChoiceFields(TypedDict):
    """An answer of a completion, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class ServedModelFields(TypedDict):
    """What `/v1/models` says of a model."""

    id: str
    object: str
    created: int
    owned_by: str
    parent: str | None
    max_model_len: int


class ApiError(Exception):
    """An error that the client gets, as OpenAI's error object.

    Args:
        status: HTTP status.
        message: what is wrong and how to correct it.
        param: the field that is wrong.
        code: a word for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def to_json(self) -> ApiErrorBody:
        """Return the body of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def to_api_error(error: BaseException) -> ApiError:
    """Return what a client gets for an exception; one that is a bug says nothing about the inside of the server."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, f"the server has no room for the request: {error.message}", code="queue_full")
    if isinstance(error, ServerClosing):
        return ApiError(503, error.message, code="shutting_down")
    if isinstance(error, GenerationThreadEnded):
        return ApiError(503, error.message, code="engine_failed")
    if isinstance(error, TimeoutError):
        return ApiError(504, "the answer took too long (--timeout)", code="timeout")
    if is_out_of_memory(error):
        return ApiError(503, "the server has no memory left for this request", code="out_of_memory")
    if isinstance(error, SlimtuneError):
        return ApiError(500, error.message, code=error.code)
    return ApiError(500, "the server failed: its log says why", code="internal_error")


def _to_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _read_prompts(value: Any) -> Any:
    """Return a list of prompts; a prompt is a text or a list of token ids."""
    is_one = isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int)
    return [value] if is_one else value


Zero = Annotated[float | None, Field(ge=0, le=0)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Fields):
    """What a stream contains beside the answer."""

    include_usage: bool | None = None


class GenerationRequest(_Fields):
    """The fields that both endpoints share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_ANSWERS)
    stop: Annotated[Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None, BeforeValidator(_to_list)] = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    user: str | None = None  # names the client's user; nothing depends on it
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Annotated[dict[str, Any] | None, Field(max_length=0)] = None


class ResponseFormat(_Fields):
    """Answers are plain text."""

    type: Literal["text"]


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    response_format: ResponseFormat | None = None


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: Annotated[
        list[str | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]],
        BeforeValidator(_read_prompts),
        Field(min_length=1, max_length=MAX_PROMPTS),
    ]
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


AnyRequest = TypeVar("AnyRequest", bound=GenerationRequest)


def parse_request_body(kind: type[AnyRequest], body: bytes) -> AnyRequest:
    """Return the request in a body; raise ApiError for the first thing that is wrong with it."""
    try:
        value = decode_json_without_duplicate_keys(body.decode())
    except RowError as error:
        raise ApiError(400, f"the request {error}", code="invalid_json") from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body of the request is no JSON in UTF-8", code="invalid_json") from error
    if isinstance(value, dict):  # OpenAI's clients send null for a field that is not given
        value = {name: given for name, given in value.items() if given is not None}
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    param = ".".join(str(part) for part in first["loc"][:2] if isinstance(part, int) or part in kind.model_fields)
    name = ".".join(map(str, first["loc"]))[:100]
    if first["type"] == "extra_forbidden":
        known = kind.model_fields if len(first["loc"]) == 1 else {}
        message = f"the server does not support the field {name!r}{suggest(name, known)}"
        raise ApiError(400, message, name, "unknown_field")
    message = f"{name or 'the body'}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    raise ApiError(400, message, param or None, "invalid_value")


def find_served_model(models: dict[str, ServedModel], name: str) -> ServedModel:
    """Return the model of a name; raise ApiError if there is none."""
    if name not in models:
        known = f"the server has {format_names(models)}"
        raise ApiError(
            404,
            f"there is no model {name[:100]!r}{suggest(name[:100], models)}: {known}",
            "model",
            "model_not_found",
        )
    return models[name]


def format_chat_logprobs(model: ServedModel, logprobs: list[TokenLogprob]) -> ChatLogprobs:
    """Return `logprobs` of a choice of a chat."""

    def entry(token: int, logprob: float) -> TokenLogprobFields:
        text = model.tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content: list[TokenLogprobEntry] = [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(*other) for other in one.top]} for one in logprobs
    ]
    return {"content": content, "refusal": None}


def format_completion_logprobs(model: ServedModel, logprobs: list[TokenLogprob], offset: int) -> CompletionLogprobs:
    """Return `logprobs` of a choice of a completion; `offset` counts the characters of the answer before it."""
    tokens = [model.tokenizer.decode([one.token]) for one in logprobs]
    offsets = [offset + sum(map(len, tokens[:i])) for i in range(len(tokens))]
    top = [{model.tokenizer.decode([token]): value for token, value in one.top} for one in logprobs]
    values = [one.logprob for one in logprobs]
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


def format_server_sent_event(value: Mapping[str, object]) -> bytes:
    """Return a server-sent event."""
    return b"data: " + json.dumps(value, allow_nan=False).encode() + b"\n\n"
