"""Requests, answers and errors as OpenAI's API has them.

A field that is null counts as not given. One that the server does not know is an error. A field that would change the
answer, but is not supported, may only have the value that changes nothing: many clients always send it.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, NotRequired, TypedDict, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from ..core.data.messages import RowError, ToolCall
from ..core.foundation.files import to_json
from ..errors import SlimtuneError, format_names, is_out_of_memory, suggest
from ..extras.message_parsing import decode_json_without_duplicate_keys
from ..generation.answer_grammar import (
    GrammarError,
    make_choice_grammar,
    make_json_schema_grammar,
    make_regex_grammar,
)
from ..generation.answer_queue import (
    GenerationThreadEnded,
    PromptTokenLogprob,
    QueueFull,
    ServerClosing,
    TokenLogprob,
)
from .served_models import ServedModel

MAX_ANSWERS, MAX_LOGPROBS, MAX_STOPS, MAX_STOP_LENGTH, MAX_PROMPTS = 16, 20, 4, 256, 16
MAX_PROMPT_LOGPROBS = 1 << 20  # of all tokens of a request's prompts together


GUIDED_FIELDS = ("guided_regex", "guided_json", "guided_choice")
"""What vLLM called them before 0.12."""


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


class PromptLogprobFields(TypedDict):
    """What `prompt_logprobs` says of a token at a position of the prompt."""

    logprob: float
    rank: int


class CompletionChoiceFields(TypedDict):
    """An answer of a completion, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[list[dict[str, PromptLogprobFields] | None]]


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
    if isinstance(error, GrammarError):
        return ApiError(400, error.message, code="invalid_grammar")
    if isinstance(error, SlimtuneError):
        return ApiError(500, error.message, code=error.code)
    return ApiError(500, "the server failed: its log says why", code="internal_error")


def to_grammar_api_error(error: GrammarError, field: str) -> ApiError:
    """Return what a client gets for a grammar that cannot bind an answer."""
    more = (f"; expected: {error.expected}" if error.expected else "") + (f" ({error.hint})" if error.hint else "")
    return ApiError(400, f"{field}: {error.message}{more}", field, "invalid_grammar")


def _to_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _read_prompts(value: Any) -> Any:
    """Return a list of prompts; a prompt is a text or a list of token ids."""
    is_one = isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int)
    return [value] if is_one else value


def accept_only(*values: Any) -> BeforeValidator:
    """Return a check that refuses other values of a field as not supported."""

    def check(value: Any) -> Any:
        if not any(value == one and (type(value) is bool) == (type(one) is bool) for one in values):
            *others, last = (to_json(one) for one in values)
            known = f"{', '.join(others)} and {last}" if others else last
            raise PydanticCustomError(
                "unsupported_value", "{value}; it takes only {known}", {"value": to_json(value)[:60], "known": known}
            )
        return value

    return BeforeValidator(check)


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Fields):
    """What a stream contains beside the answer."""

    include_usage: bool | None = None


class JsonSchemaFormat(_Fields):
    """`response_format.json_schema`; the schema binds the answer whether `strict` is true or not."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Fields):
    """`response_format`: text, any JSON object, or what a JSON Schema allows."""

    type: Annotated[str, accept_only("text", "json_object", "json_schema")]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _require_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("json_schema", 'json_schema belongs to the type "json_schema"')
        return self


class StructuredOutputs(_Fields):
    """`structured_outputs`, vLLM's field: one of a regular expression, a JSON Schema, and a list of choices."""

    regex: Annotated[str, Field(min_length=1)] | None = None
    json_: dict[str, Any] | None = Field(None, alias="json")
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _require_one(self) -> "StructuredOutputs":
        if [self.regex, self.json_, self.choice].count(None) != 2:
            raise PydanticCustomError("one_of", "it needs one of regex, json and choice")
        return self


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
    frequency_penalty: Annotated[float | None, accept_only(0)] = None
    presence_penalty: Annotated[float | None, accept_only(0)] = None
    logit_bias: Annotated[dict[str, Any] | None, accept_only({})] = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    top_k: Annotated[int | None, accept_only(0, -1)] = None
    min_p: Annotated[float | None, accept_only(0)] = None
    repetition_penalty: Annotated[float | None, accept_only(1)] = None

    def make_grammar(self, *, json_on_one_line: bool) -> tuple[str, str] | None:
        """Return the grammar that binds the answers, and the field that asks for it; None: any text.

        Raises:
            ApiError: two fields ask for one, or it cannot be one.
        """
        form, outputs = self.response_format, self.structured_outputs
        if form is not None and form.type == "text":
            form = None
        if form is not None and outputs is not None:
            message = "response_format and structured_outputs both say what an answer matches"
            raise ApiError(400, message, "structured_outputs", "invalid_value")
        field = "response_format" if form is not None else "structured_outputs"
        try:
            if form is not None:
                schema = form.json_schema.schema_ if form.json_schema is not None else {"type": "object"}
                return make_json_schema_grammar(schema, on_one_line=json_on_one_line), field
            if outputs is None:
                return None
            if outputs.regex is not None:
                return make_regex_grammar(outputs.regex), field
            if outputs.choice is not None:
                return make_choice_grammar(outputs.choice), field
            return make_json_schema_grammar(outputs.json_ or {}, on_one_line=json_on_one_line), field
        except GrammarError as error:
            raise to_grammar_api_error(error, field) from error


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Annotated[str | None, accept_only("auto", "none")] = None
    parallel_tool_calls: Annotated[bool | None, accept_only(True)] = None


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: Annotated[
        list[str | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]],
        BeforeValidator(_read_prompts),
        Field(min_length=1, max_length=MAX_PROMPTS),
    ]
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: Annotated[bool | None, accept_only(False)] = None
    best_of: Annotated[int | None, accept_only(1)] = None
    suffix: Annotated[str | None, accept_only("")] = None
    return_token_ids: bool | None = None
    logprobs_mode: Annotated[str | None, accept_only("raw_logprobs", "processed_logprobs")] = None
    stop_token_ids: list[int] | None = None
    prompt_logprobs: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _require_one_token_after_scored_prompt(self) -> "CompletionRequest":
        if self.prompt_logprobs is not None and (self.max_tokens != 1 or (self.n or 1) != 1 or self.stream):
            raise PydanticCustomError("prompt_logprobs", "prompt_logprobs needs max_tokens 1 and n 1, and no stream")
        return self


class TokenizeRequest(_Fields):
    """`POST /tokenize`, vLLM's: a text, or a conversation that ends before an answer."""

    model: str
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _require_prompt_or_messages(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("one_of", "it needs one of prompt and messages")
        return self


class LoadAdapterRequest(_Fields):
    """`POST /v1/load_lora_adapter`, vLLM's."""

    lora_name: str = Field(min_length=1, max_length=200)
    lora_path: str = Field(min_length=1)


class UnloadAdapterRequest(_Fields):
    """`POST /v1/unload_lora_adapter`, vLLM's."""

    lora_name: str


AnyRequest = TypeVar("AnyRequest", bound=_Fields)


def parse_request_body(request_type: type[AnyRequest], body: bytes) -> AnyRequest:
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
        return request_type.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    param = ".".join(
        str(part) for part in first["loc"][:2] if isinstance(part, int) or part in request_type.model_fields
    )
    name = ".".join(map(str, first["loc"]))[:100]
    if first["type"] == "extra_forbidden":
        known = request_type.model_fields if len(first["loc"]) == 1 else {}
        instead = f"; structured_outputs has {name[7:]}" if name in GUIDED_FIELDS else suggest(name, known)
        message = f"the server does not support the field {name!r}{instead}"
        raise ApiError(400, message, name, "unknown_field")
    if first["type"] == "unsupported_value":
        raise ApiError(400, f"the server does not support {name} {first['msg']}", param, "unsupported_value")
    message = f"{name or 'the body'}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    raise ApiError(400, message, param or None, "invalid_value")


def require_served_model(models_by_name: dict[str, ServedModel], name: str) -> ServedModel:
    """Return the model of a name; raise ApiError if there is none."""
    if name not in models_by_name:
        known = f"the server has {format_names(models_by_name)}"
        raise ApiError(
            404,
            f"there is no model {name[:100]!r}{suggest(name[:100], models_by_name)}: {known}",
            "model",
            "model_not_found",
        )
    return models_by_name[name]


def make_chat_logprobs(served_model: ServedModel, logprobs: list[TokenLogprob]) -> ChatLogprobs:
    """Return `logprobs` of a choice of a chat."""

    def entry(token: int, logprob: float) -> TokenLogprobFields:
        text = served_model.tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content: list[TokenLogprobEntry] = [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(*other) for other in one.top]} for one in logprobs
    ]
    return {"content": content, "refusal": None}


def make_completion_logprobs(
    served_model: ServedModel, logprobs: list[TokenLogprob], offset: int
) -> CompletionLogprobs:
    """Return `logprobs` of a choice of a completion; `offset` counts the characters of the answer before it."""
    tokens = [served_model.tokenizer.decode([one.token]) for one in logprobs]
    offsets = [offset + sum(map(len, tokens[:i])) for i in range(len(tokens))]
    top = [{served_model.tokenizer.decode([token]): value for token, value in one.top} for one in logprobs]
    values = [one.logprob for one in logprobs]
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


def make_prompt_logprobs(logprobs: list[PromptTokenLogprob]) -> list[dict[str, PromptLogprobFields] | None]:
    """Return vLLM's `prompt_logprobs` of a choice: nothing for the first token, which nothing stands before."""
    found: list[dict[str, PromptLogprobFields] | None] = [None]
    for one in logprobs:
        own: dict[str, PromptLogprobFields] = {str(one.token): {"logprob": one.logprob, "rank": one.rank}}
        found.append(own | {str(t): {"logprob": v, "rank": rank} for rank, (t, v) in enumerate(one.top, 1)})
    return found


def format_server_sent_event(value: Mapping[str, object]) -> bytes:
    """Return a server-sent event."""
    return b"data: " + json.dumps(value, allow_nan=False).encode() + b"\n\n"
