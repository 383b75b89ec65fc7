"""The HTTP endpoints: `/v1/chat/completions`, `/v1/completions`, `/tokenize`, `/v1/models`, `/health`, of adapters.

What a page in a browser on the same machine could do is refused: a request must name this host (a page's own domain may
point to 127.0.0.1) and its body must be JSON by its content type (a page may send other types elsewhere without
asking). No header allows other origins. Nothing in a request names a file, unless the server was started with a folder
of adapters to load (adapter_loading.py).
"""

import asyncio
import contextlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from ..core.data.chat_template import get_chat_template
from ..core.data.messages import RowError, ToolCall, reject_unrendered_reasoning
from ..errors import AdapterError, DataError, ModelError, UsageError
from ..extras.message_parsing import parse_messages_and_train_mask, require_text
from ..extras.row_formats.chats import parse_tools
from ..extras.sockets import parse_host_header_or_none
from ..generation.answer_grammar import CompiledGrammar, GrammarCompiler, GrammarError
from ..generation.answer_queue import AnswerPiece, BaseAnswerQueue, GeneratedAnswer, SamplingParams, TokenLogprob
from ..generation.generation_models import tokenize_chat_prompt
from .adapter_loading import AdapterLoader
from .openai_protocol import (
    MAX_ANSWERS,
    MAX_PROMPT_LOGPROBS,
    ApiError,
    ChatAnswerFields,
    ChatChoiceFields,
    ChatChunkFields,
    ChatRequest,
    CompletionChoiceFields,
    CompletionRequest,
    GenerationRequest,
    LoadAdapterRequest,
    ServedModelFields,
    TokenizeRequest,
    ToolCallDelta,
    UnloadAdapterRequest,
    format_server_sent_event,
    make_chat_logprobs,
    make_completion_logprobs,
    make_prompt_logprobs,
    parse_request_body,
    require_served_model,
    to_api_error,
    to_grammar_api_error,
)
from .served_models import ServedModel

log = logging.getLogger(__name__)

HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
BODY_SECONDS, MAX_BODY = 30, 2**20
"""Longest time in which a body must have arrived, and its most bytes."""
MAX_COMPILERS = 2
"""Grammars that are compiled at the same time."""
LATE_SECONDS = 30
"""How long after its deadline a request ends even if the engine, which ends answers at their deadlines, does not."""


class EventStreamResponse(StreamingResponse):
    """Server-sent events. `release` is called once they are sent or the client is gone."""

    def __init__(self, encoded_events: AsyncIterator[bytes], release: Callable[[], None]) -> None:
        super().__init__(encoded_events, media_type="text/event-stream", headers=HEADERS)
        self._release = release

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        try:
            with contextlib.suppress(OSError):  # uvicorn's, if the client goes away while an event is sent
                await _run_while_connected(self.stream_response(send), receive)
        finally:
            self._release()


@dataclass
class AnswerChoice:
    """One of the answers to a request, as far as it is generated."""

    index: int
    answer: GeneratedAnswer
    text: str = ""
    sent: int = 0  # characters
    logprobs: list[TokenLogprob] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class ChatResponseBuilder:
    """What `/v1/chat/completions` sends."""

    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, served_model: ServedModel, uses_tools: bool, include_logprobs: bool) -> None:
        self.served_model, self.include_logprobs = served_model, include_logprobs
        self.tool_calls = served_model.tool_calls if uses_tools else None

    def format_choice(self, choice: AnswerChoice) -> ChatChoiceFields:
        """Return a finished answer."""
        text, calls = self.tool_calls.parse(choice.text) if self.tool_calls else (choice.text, [])
        message: ChatAnswerFields = {
            "role": "assistant",
            "content": text if text or not calls else None,
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = calls
        reason = "tool_calls" if calls and choice.finish_reason == "stop" else choice.finish_reason
        logprobs = make_chat_logprobs(self.served_model, choice.logprobs) if self.include_logprobs else None
        return {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def start_chunks(self, choice: AnswerChoice) -> list[ChatChunkFields]:
        """Return what a stream says before an answer begins."""
        return [{"index": choice.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]

    def format_chunks(self, choice: AnswerChoice, piece: AnswerPiece) -> list[ChatChunkFields]:
        """Return what a piece adds to an answer; the beginning of a tool call is held back until it is complete."""
        text: str = choice.text
        calls: list[ToolCall] = []
        if self.tool_calls:
            if piece.finish_reason:
                text, calls = self.tool_calls.parse(text)
            else:
                text = text[: self.tool_calls.find_start(text)].rstrip()
        new, choice.sent = text[choice.sent :], max(choice.sent, len(text))
        chunks: list[ChatChunkFields] = []
        if new or piece.logprobs:
            logprobs = make_chat_logprobs(self.served_model, list(piece.logprobs)) if self.include_logprobs else None
            chunks.append(
                {"index": choice.index, "delta": {"content": new}, "logprobs": logprobs, "finish_reason": None}
            )
        if calls:
            numbered: list[ToolCallDelta] = [{"index": i, **call} for i, call in enumerate(calls)]
            chunks.append({"index": choice.index, "delta": {"tool_calls": numbered}, "finish_reason": None})
        if piece.finish_reason:
            reason = "tool_calls" if calls and piece.finish_reason == "stop" else piece.finish_reason
            chunks.append({"index": choice.index, "delta": {}, "finish_reason": reason})
        return chunks


class CompletionResponseBuilder:
    """What `/v1/completions` sends."""

    object, chunk_object, prefix = "text_completion", "text_completion", "cmpl-"

    def __init__(self, served_model: ServedModel, include_logprobs: bool, include_token_ids: bool = False) -> None:
        self.served_model, self.include_logprobs = served_model, include_logprobs
        self.include_token_ids = include_token_ids

    def format_choice(self, choice: AnswerChoice) -> CompletionChoiceFields:
        """Return a finished answer."""
        found = self._format(choice, choice.text, choice.logprobs, 0, choice.finish_reason, choice.token_ids)
        if choice.answer.params.prompt_logprobs is not None:
            found["prompt_logprobs"] = make_prompt_logprobs(choice.answer.prompt_logprobs)
        return found

    def start_chunks(self, choice: AnswerChoice) -> list[CompletionChoiceFields]:
        """Return what a stream says before an answer begins: nothing."""
        return []

    def format_chunks(self, choice: AnswerChoice, piece: AnswerPiece) -> list[CompletionChoiceFields]:
        """Return what a piece adds to an answer."""
        if not (piece.text or piece.logprobs or piece.finish_reason):
            return []
        offset = len(choice.text) - len(piece.text)
        ids = [*piece.token_ids]
        return [self._format(choice, piece.text, list(piece.logprobs), offset, piece.finish_reason, ids)]

    def _format(
        self,
        choice: AnswerChoice,
        text: str,
        logprobs: list[TokenLogprob],
        offset: int,
        reason: str | None,
        token_ids: list[int],
    ) -> CompletionChoiceFields:
        shown = make_completion_logprobs(self.served_model, logprobs, offset) if self.include_logprobs else None
        found: CompletionChoiceFields = {
            "index": choice.index, "text": text, "logprobs": shown, "finish_reason": reason,
        }  # fmt: skip
        return {**found, "token_ids": token_ids} if self.include_token_ids else found


@dataclass(frozen=True)
class TokenizedRequest:
    """A request that was read and tokenized."""

    request: GenerationRequest
    response_builder: ChatResponseBuilder | CompletionResponseBuilder
    prompts: list[Sequence[int]]
    max_tokens: int | None  # None: as many as there is room for
    top_logprobs: int | None
    grammar_and_field: tuple[str, str] | None  # that binds the answers, and the field that asks for it


class OpenAiApi:
    """The endpoints over some models.

    Args:
        models: by name.
        queue: what generates the answers.
        hosts: names that a request may have in its Host header; empty: any.
        api_key: that a request must have; None: none.
        timeout: seconds from a request to the end of its answer.
        adapter_loader: adds and removes adapters; None: requests cannot.
    """

    def __init__(
        self, models: Sequence[ServedModel], queue: BaseAnswerQueue, hosts: Collection[str], api_key: str | None,
        timeout: float, adapter_loader: AdapterLoader | None = None,
    ) -> None:  # fmt: skip
        self.adapter_loader = adapter_loader
        self.models = {model.name: model for model in models}
        self.queue, self.hosts, self.timeout = queue, hosts, timeout
        self.api_key, self.started = api_key, int(time.time())
        self._models_lock = asyncio.Lock()
        self._grammars, self._compilers = GrammarCompiler(), ThreadPoolExecutor(MAX_COMPILERS, "slimtune-grammar")
        # Requests that are being read or tokenized, or wait or run.
        self._requests, self._max_requests = 0, queue.max_batch + queue.max_waiting

    def build(self) -> Callable[..., Awaitable[None]]:
        """Return the ASGI application."""
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/v1/models", self.list_models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.show_model, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
        ]
        if self.adapter_loader is not None:
            routes.append(Route("/v1/load_lora_adapter", self.load_adapter, methods=["POST"]))
            routes.append(Route("/v1/unload_lora_adapter", self.unload_adapter, methods=["POST"]))
        app = Starlette(routes=routes, exception_handlers={HTTPException: _answer_error, ApiError: _answer_error})
        app.router.redirect_slashes = False

        async def check_access(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                try:
                    self._check_access(Request(scope))
                except ApiError as error:
                    await _make_response(error.to_json(), error.status)(scope, receive, send)
                    return
            await app(scope, receive, send)

        return check_access

    def _check_access(self, request: Request) -> None:
        host = request.headers.get("host", "")
        if self.hosts and parse_host_header_or_none(host) not in self.hosts:
            names = " or ".join(sorted(set(self.hosts)))
            raise ApiError(403, f"the Host header is {host[:100]!r}, and this server is {names}", code="wrong_host")
        if self.api_key is not None:
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            sent = key.encode("latin-1")  # Starlette decodes headers as Latin-1
            if scheme.lower() != "bearer" or not hmac.compare_digest(sent, self.api_key.encode()):
                raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def health(self, request: Request) -> Response:
        """Answer how many requests run and wait; 503 and why if no answer is generated: the thread ended, or hangs."""
        status, reason = "hangs", self.queue.hang_detector.describe_hang()
        if self.queue.failure is not None:
            status, reason = "failed", "the thread that generates answers has ended by an error"
        if reason is None:
            return _make_response({"status": "ok", **self.queue.count()})
        return _make_response({"status": status, "reason": reason, **self.queue.count()}, 503)

    async def list_models(self, request: Request) -> Response:
        """Answer the models."""
        return _make_response({"object": "list", "data": [self._describe(m) for m in self.models.values()]})

    async def show_model(self, request: Request) -> Response:
        """Answer one model."""
        return _make_response(self._describe(require_served_model(self.models, request.path_params["name"])))

    async def load_adapter(self, request: Request) -> Response:
        """Add an adapter as a model."""

        def load(loader: AdapterLoader, body: bytes) -> None:
            asked = parse_request_body(LoadAdapterRequest, body)
            if asked.lora_name in self.models:
                raise ApiError(400, f"the adapter {asked.lora_name!r} has already been loaded", "lora_name")
            self.models[asked.lora_name] = loader.load(asked.lora_name, asked.lora_path)

        return await self._change_models(request, load)

    async def unload_adapter(self, request: Request) -> Response:
        """Remove an adapter."""

        def unload(loader: AdapterLoader, body: bytes) -> None:
            name = parse_request_body(UnloadAdapterRequest, body).lora_name
            loader.unload(require_served_model(self.models, name))
            del self.models[name]

        return await self._change_models(request, unload)

    async def _change_models(self, request: Request, change: Callable[[AdapterLoader, bytes], None]) -> Response:
        assert self.adapter_loader is not None
        async with self._models_lock:
            try:
                await run_in_threadpool(change, self.adapter_loader, await _read_body(request))
            except ClientDisconnect:
                return Response(status_code=499)
            except (UsageError, DataError, ModelError, AdapterError) as error:
                raise ApiError(400, error.message, "lora_path", error.code) from error
            except Exception as error:
                raise _log_and_convert(error) from error
        return _make_response({"models": [*self.models]})

    def _describe(self, model: ServedModel) -> ServedModelFields:
        return {
            "id": model.name, "object": "model", "created": self.started, "owned_by": "slimtune",
            "parent": model.parent, "max_model_len": model.max_length,
        }  # fmt: skip

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""

        def prepare(body: bytes) -> TokenizedRequest:
            asked = parse_request_body(ChatRequest, body)
            model = require_served_model(self.models, asked.model)
            if asked.top_logprobs and not asked.logprobs:
                raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs", "invalid_value")
            tools, ids = _tokenize_chat(model, asked)
            if (grammar := asked.make_grammar(json_on_one_line=not self.queue.masks_tokens)) is not None and tools:
                message = f"{grammar[1]} with tools is not supported: an answer that a grammar binds calls none"
                raise ApiError(400, message, grammar[1], "unsupported_value")
            count = (asked.top_logprobs or 0) if asked.logprobs else None
            limit = asked.max_completion_tokens or asked.max_tokens
            return TokenizedRequest(
                asked, ChatResponseBuilder(model, bool(tools), count is not None), [ids], limit, count, grammar
            )

        return await self._answer(request, prepare)

    async def complete(self, request: Request) -> Response:
        """Continue a text."""

        def prepare(body: bytes) -> TokenizedRequest:
            asked = parse_request_body(CompletionRequest, body)
            model = require_served_model(self.models, asked.model)
            prompts = [_tokenize_text(model, prompt) for prompt in asked.prompt]
            form = CompletionResponseBuilder(model, asked.logprobs is not None, bool(asked.return_token_ids))
            if not model.end_tokens.issuperset(asked.stop_token_ids or ()):
                ends = f"the model {model.name!r} ends answers with {sorted(model.end_tokens)}, and with no other token"
                raise ApiError(400, ends, "stop_token_ids", "unsupported_value")
            if asked.prompt_logprobs is not None:
                self._require_scorable_prompts(prompts, asked.prompt_logprobs, model)
            grammar = asked.make_grammar(json_on_one_line=not self.queue.masks_tokens)
            return TokenizedRequest(asked, form, prompts, asked.max_tokens or 16, asked.logprobs, grammar)

        return await self._answer(request, prepare)

    async def tokenize(self, request: Request) -> Response:
        """Answer the token ids of a text, or of a conversation."""

        def respond(body: bytes) -> Response:
            asked = parse_request_body(TokenizeRequest, body)
            model = require_served_model(self.models, asked.model)
            if asked.messages is not None:
                chat = {"model": asked.model, "messages": asked.messages}
                _, ids = _tokenize_chat(model, ChatRequest.model_validate(chat))
            else:
                special = asked.add_special_tokens is not False
                ids = model.tokenizer(asked.prompt, add_special_tokens=special, verbose=False)["input_ids"]
            return _make_response({"tokens": ids, "count": len(ids), "max_model_len": model.max_length})

        try:
            return await run_in_threadpool(respond, await _read_body(request))
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:
            raise _log_and_convert(error) from error

    async def _answer(self, request: Request, prepare: Callable[[bytes], TokenizedRequest]) -> Response:
        try:
            body = await _read_body(request)  # a client that sends it slowly takes nobody's place
        except ClientDisconnect:
            return Response(status_code=499)
        if self._requests >= self._max_requests:
            raise ApiError(429, f"{self._requests} requests run or wait already", code="queue_full")
        self._requests += 1
        choices: list[AnswerChoice] = []
        pieces: asyncio.Queue[tuple[AnswerChoice, AnswerPiece]] = asyncio.Queue()
        is_streaming = False

        def release() -> None:
            self._requests -= 1
            self.queue.cancel([choice.answer for choice in choices])

        try:
            prepared = await run_in_threadpool(prepare, body)
            asked, form = prepared.request, prepared.response_builder
            compiled = await self._compile_grammar(prepared)
            choices += self._make_choices(prepared, pieces, compiled)
            self.queue.submit([choice.answer for choice in choices])
            head = {
                "id": form.prefix + secrets.token_hex(12),
                "created": int(time.time()),
                "model": form.served_model.name,
            }
            if asked.stream:
                with_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
                events = self._stream(form, head, choices, pieces, with_usage)
                is_streaming = True
                return EventStreamResponse(events, release)
            if not await _run_while_connected(_collect(choices, pieces), request.receive):
                return Response(status_code=499)  # nobody reads it

            def respond() -> Response:
                shown = [form.format_choice(choice) for choice in choices]
                return _make_response({**head, "object": form.object, "choices": shown, "usage": _count_usage(choices)})

            return await run_in_threadpool(respond)  # log-probabilities of long answers take seconds
        except Exception as error:
            raise _log_and_convert(error) from error
        finally:
            if not is_streaming:
                release()

    def _require_scorable_prompts(self, prompts: Sequence[Sequence[int]], top_k: int, model: ServedModel) -> None:
        """Raise ApiError if the server gives no log-probabilities of prompts, or not so many."""
        if not self.queue.scores_prompts:
            message = "llama.cpp gives no log-probabilities of a prompt; slimtune serve --engine torch does"
            raise ApiError(400, message, "prompt_logprobs", "unsupported_value")
        tokens, most = sum(map(len, prompts)), MAX_PROMPT_LOGPROBS
        if tokens * (1 + min(top_k, model.vocab_size)) > most:
            message = f"{top_k} log-probabilities of each of {tokens} tokens are more than {most:,} together"
            raise ApiError(400, message, "prompt_logprobs", "invalid_value")

    async def _compile_grammar(self, prepared: TokenizedRequest) -> CompiledGrammar | None:
        """Compile the grammar of a request, in a thread that neither the model nor other requests wait for."""
        if prepared.grammar_and_field is None:
            return None
        lark, field = prepared.grammar_and_field
        compile_it = self._grammars.compile_for_bytes
        if self.queue.masks_tokens:
            model = prepared.response_builder.served_model
            more = {"tokenizer": model.tokenizer, "end_tokens": model.end_tokens, "vocab_size": model.vocab_size}
            compile_it = partial(self._grammars.compile_for_tokens, **more)
        try:
            compiling = asyncio.get_running_loop().run_in_executor(self._compilers, compile_it, lark)
            return await asyncio.wait_for(compiling, self.timeout)
        except GrammarError as error:
            raise to_grammar_api_error(error, field) from error

    def _make_choices(
        self, prepared: TokenizedRequest, pieces: asyncio.Queue, grammar: CompiledGrammar | None
    ) -> list[AnswerChoice]:
        """Return the choices of a request, whose pieces arrive in the queue of this thread's loop."""
        asked, model, limit, prompts = (
            prepared.request,
            prepared.response_builder.served_model,
            prepared.max_tokens,
            prepared.prompts,
        )
        n, loop = asked.n or 1, asyncio.get_running_loop()
        if len(prompts) * n > MAX_ANSWERS:
            raise ApiError(400, f"{len(prompts)} prompts × n = {n} are more than {MAX_ANSWERS} answers", "n")
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        choices: list[AnswerChoice] = []
        for prompt in prompts:
            room = model.max_length - len(prompt)
            if room < (limit or 1):
                raise ApiError(
                    400,
                    f"the prompt has {len(prompt)} tokens and the answer may have {limit or 1}: the model "
                    f"{model.name!r} takes {model.max_length} together",
                    "max_tokens" if limit else None,
                    "context_length_exceeded",
                )
            for i in range(n):
                params = SamplingParams(
                    max_new_tokens=limit or room,
                    temperature=1.0 if asked.temperature is None else asked.temperature,
                    top_p=1.0 if asked.top_p is None else asked.top_p,
                    seed=(seed + i) % 2**63,
                    stop=tuple(asked.stop or ()),
                    top_logprobs=prepared.top_logprobs,
                    logprobs_at_temperature=getattr(asked, "logprobs_mode", None) == "processed_logprobs",
                    grammar=grammar,
                    prompt_logprobs=getattr(asked, "prompt_logprobs", None),
                )
                index = len(choices)

                def send(piece: AnswerPiece, index: int = index) -> None:
                    if not loop.is_closed():
                        loop.call_soon_threadsafe(pieces.put_nowait, (choices[index], piece))

                deadline = time.monotonic() + self.timeout
                choices.append(AnswerChoice(index, GeneratedAnswer(model, prompt, params, send, deadline)))
        return choices

    async def _stream(
        self,
        form: Any,
        head: dict[str, Any],
        choices: list[AnswerChoice],
        pieces: asyncio.Queue,
        with_usage: bool,
    ) -> AsyncIterator[bytes]:
        """Yield the events of a stream."""
        head = {**head, "object": form.chunk_object}
        usage = {"usage": None} if with_usage else {}
        try:
            for choice in choices:
                for chunk in form.start_chunks(choice):
                    yield format_server_sent_event({**head, "choices": [chunk], **usage})
            while any(choice.finish_reason is None for choice in choices):
                choice, piece = await _add_next_piece(choices, pieces)
                for chunk in form.format_chunks(choice, piece):
                    yield format_server_sent_event({**head, "choices": [chunk], **usage})
            if with_usage:
                yield format_server_sent_event({**head, "choices": [], "usage": _count_usage(choices)})
            yield b"data: [DONE]\n\n"
        except Exception as error:
            yield format_server_sent_event(_log_and_convert(error).to_json())


def _tokenize_chat(model: ServedModel, asked: ChatRequest) -> tuple[list[dict[str, Any]] | None, list[int]]:
    """Return the tools of a request, and the ids of its prompt."""
    field = "messages"
    try:
        messages, _ = parse_messages_and_train_mask(asked.messages, require_trained_turn=False)
        field = "tools"
        tools = None if asked.tool_choice == "none" else parse_tools(asked.tools)
        if tools and model.tool_calls is None:
            message = f"the chat template of {model.name!r} does not write tool calls as JSON objects"
            raise ApiError(400, message, "tools", "unsupported_value")
        field = "messages"
        reject_unrendered_reasoning(messages, get_chat_template(model.tokenizer, tools))
        if messages[-1]["role"] == "assistant":
            raise ApiError(400, "the last message is the assistant's, so nothing is asked", "messages", "invalid_value")
        return tools, tokenize_chat_prompt(model.tokenizer, messages, tools)
    except RowError as error:
        raise ApiError(400, str(error), field, "invalid_value") from error
    except (UsageError, DataError, ModelError) as error:
        raise ApiError(400, error.message, "messages", "template_refuses") from error


def _tokenize_text(model: ServedModel, prompt: str | list[int]) -> Sequence[int]:
    if not isinstance(prompt, str):
        if max(prompt) >= model.vocab_size:
            message = f"{max(prompt)} is no token id: the model has {model.vocab_size}"
            raise ApiError(400, message, "prompt", "invalid_value")
        return prompt
    try:
        ids = model.tokenizer(require_text(prompt, "prompt", allow_empty=True), verbose=False)["input_ids"]
    except RowError as error:
        raise ApiError(400, str(error), "prompt", "invalid_value") from error
    if not ids:
        raise ApiError(400, "the prompt has no tokens", "prompt", "invalid_value")
    return ids


async def _add_next_piece(choices: list[AnswerChoice], pieces: asyncio.Queue) -> tuple[AnswerChoice, AnswerPiece]:
    """Wait for a piece and add it to its choice; raise the error of the answer, or TimeoutError long after its end."""
    remaining = choices[0].answer.deadline + LATE_SECONDS - time.monotonic()
    choice, piece = await asyncio.wait_for(pieces.get(), remaining)
    if piece.error is not None:
        raise to_api_error(piece.error) from piece.error  # the thread that generates has logged it
    choice.text += piece.text
    choice.token_ids += piece.token_ids
    choice.logprobs += piece.logprobs
    choice.finish_reason = piece.finish_reason
    return choice, piece


def _log_and_convert(error: Exception) -> ApiError:
    """Return what a client gets for an exception, and log one that is a bug."""
    converted = to_api_error(error)
    if converted is not error and converted.code == "internal_error":
        log.exception("a request failed", exc_info=error)
    return converted


async def _collect(choices: list[AnswerChoice], pieces: asyncio.Queue) -> None:
    """Wait until all choices are finished."""
    while any(choice.finish_reason is None for choice in choices):
        await _add_next_piece(choices, pieces)


async def _run_while_connected(work: Coroutine[Any, Any, None], receive: Callable[[], Awaitable[Any]]) -> bool:
    """Run `work`, but not longer than the client is there; return whether it came to its end."""

    async def wait_for_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(wait_for_disconnect())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        is_done = tasks[0].done()
        if is_done:
            tasks[0].result()
        return is_done
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read_body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        hint = "-H 'Content-Type: application/json'"
        raise ApiError(415, f"the content type is {kind[:100]!r}, not application/json ({hint})", code="no_json")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY:
                    raise ApiError(413, f"the body has more than {MAX_BODY:,} bytes", code="body_too_large")
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS} s", code="timeout") from error
    return bytes(body)


def _count_usage(choices: list[AnswerChoice]) -> dict[str, int]:
    prompts = {id(choice.answer.prompt_ids): len(choice.answer.prompt_ids) for choice in choices}
    prompt, new = sum(prompts.values()), sum(choice.answer.num_tokens for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _make_response(value: Mapping[str, object], status: int = 200) -> Response:
    headers = {**HEADERS, "Content-Type": "application/json"} | ({"Retry-After": "1"} if status == 429 else {})
    body = json.dumps(value, allow_nan=False).encode()
    return Response(body, status, headers)


async def _answer_error(request: Request, error: Any) -> Response:
    if isinstance(error, HTTPException):
        messages = {404: f"there is no {request.url.path[:100]!r}", 405: f"{request.method} is not possible here"}
        error = ApiError(error.status_code, messages.get(error.status_code, error.detail))
    return _make_response(error.to_json(), error.status)
