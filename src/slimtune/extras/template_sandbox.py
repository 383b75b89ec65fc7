"""Render chat templates, with a limit on the work that a template does for one conversation.

A chat template is a program that somebody else wrote. transformers renders it in Jinja's sandbox, where it reaches no
file and no attribute that it must not, but may run for ever or fill the memory. Here each iteration, call of a macro,
function or filter, and each text that is made costs steps, and a conversation has a number of steps that grows with its
length. What could make much from little in one operation (`*`, `**`, a width, `replace`, lists of lists) is measured
first. Whatever else a template raises becomes a `jinja2.TemplateError`, as `raise_exception` does.

Names, filters and tags are those of transformers; the variables are the same as in `apply_chat_template`.
"""

import functools
import operator
import re
import threading
from collections.abc import Callable
from typing import Any

from jinja2 import (
    Environment,
    Template,
    TemplateError,
    TemplateRuntimeError,
    TemplateSyntaxError,
    Undefined,
    nodes,
    pass_context,
)
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import _compile_jinja_template

from ..core.data.messages import REASONING_KEYS, Message
from ..errors import ModelError, SlimtuneError

Span = tuple[int, int]
MAX_TEMPLATE = 1_000_000  # characters of a template
STEPS, STEPS_PER_CHARACTER = 50_000, 50
"""Steps for each conversation, and for each of its characters. Templates in use take less than one per character."""
CHARACTERS_PER_STEP = 16  # that an operation makes
MAX_BITS = 4096  # of an integer
MAX_WIDTH = 999  # to which a text is padded or indented
_REMOVED_FILTERS = ("center", "forceescape", "pprint", "random", "slice", "striptags", "urlize", "wordwrap", "xmlattr")
_PADDING = ("center", "expandtabs", "ljust", "rjust", "to_bytes", "zfill")
_CHEAP_FILTERS = {
    "abs", "capitalize", "count", "d", "default", "e", "escape", "first", "float", "int", "last", "length", "lower",
    "safe", "title", "trim", "upper",
}  # fmt: skip
_WIDE_PERCENT = re.compile(r"%[^%a-zA-Z]*(?:\*|\d{4})")  # `%9999d`, `%*d`
_WIDE_FORMAT = re.compile(r"\{[^{}]*:[^{}]*(?:\{|\d{4})")  # `{:9999}`, `{:{}}`
_REASONING = frozenset({"reasoning_content", "thinking", "reasoning"})
_work = threading.local()


def render_sandboxed_template(template: str, values: dict[str, Any], collected_spans: list[Span]) -> str:
    """Return the text of a chat template with these variables; `collected_spans` gets the characters that it marks.

    Raises:
        TemplateError: the template refuses the conversation, or fails.
        ModelError: it takes too many steps.
    """
    compiled = _compile(template)
    messages = [
        message if _REASONING.isdisjoint(message) else _alias_reasoning(message) for message in values["messages"]
    ]
    values = {**values, "messages": messages}
    parts: list[str] = []
    try:
        _work.steps = STEPS + STEPS_PER_CHARACTER * (len(repr(messages)) + len(repr(values["tools"])))
        with compiled.environment.activate_tracker(parts, collected_spans):  # type: ignore[attr-defined]
            for part in compiled.generate(values):
                _spend(len(part))
                parts.append(part)
        text = "".join(parts)
        if not text.isascii():
            text.encode()  # fails for half of a character, which no tokenizer takes
    except (SlimtuneError, TemplateError):
        raise
    except Exception as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else f"{type(error).__name__}: {error}"
        raise TemplateRuntimeError(reason) from error
    return text


def _alias_reasoning(message: Message) -> Message:
    """Return a message whose reasoning has the two names that templates read, as in transformers."""
    given = next((message[k] for k in REASONING_KEYS if message.get(k) is not None), "")
    return {"thinking": given, **message, "reasoning_content": given} if given else message


@functools.lru_cache(maxsize=32)
def _compile(template: str) -> Template:
    if len(template) > MAX_TEMPLATE:
        raise ModelError(f"the chat template has {len(template):,} characters", f"at most {MAX_TEMPLATE:,}")
    _work.steps = STEPS  # constants are computed while it is compiled
    environment = _make_environment()
    try:
        tree = environment.parse(template)
        _count_steps(tree)
        return environment.from_string(tree)
    except (SlimtuneError, TemplateError):
        raise
    except (Exception, MemoryError) as error:  # Python's compiler: nested too deep, too large a number
        raise TemplateSyntaxError(f"{type(error).__name__}: {str(error)[:200]}", 1) from error


def _make_environment() -> Environment:
    """Return transformers' environment with counted operations."""
    theirs = _compile_jinja_template("").environment
    extensions = [type(extension) for extension in theirs.extensions.values()]
    environment = _CountingEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=_to_text)
    environment.globals.update({name: value for name, value in theirs.globals.items() if name != "lipsum"})
    del environment.globals["lipsum"]
    for name, function in theirs.filters.items():
        environment.filters[name] = function if name in _CHEAP_FILTERS else _count_filter(name, function)
    for name in _REMOVED_FILTERS:
        del environment.filters[name]
    environment.filters |= {"_step": _step, "_concatenate": _concatenate, "_measure": _measure_value}
    return environment


class _CountingEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute a binary operator of the template."""
        if operator != "+":
            _check_operands(operator, left, right)
        result = _OPERATORS[operator](left, right)
        if type(result) is not int and type(result) is not float:
            _spend(len(result))
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method of the template."""
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes | int):
            args = _check_method(owner, __obj.__name__, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        if type(result) is str or type(result) is range:
            _spend(len(result) if type(result) is str else len(result) * CHARACTERS_PER_STEP)
        elif isinstance(result, dict | list):
            _spend(_measure(result))
        else:
            _spend(0)
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return the sandbox's `str.format` of a text, unless it is a wide one."""
        wrapper = super().wrap_str_format(value)
        if wrapper is not None and _WIDE_FORMAT.search(value.__self__):
            raise _too_wide()
        return wrapper


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add, "*": operator.mul, "**": operator.pow, "%": operator.mod,
}  # fmt: skip


def _spend(characters: int) -> None:
    """Count a step, and those for the characters that it makes."""
    _work.steps -= 1 + characters // CHARACTERS_PER_STEP
    if _work.steps < 0:
        raise ModelError(
            "the chat template does not come to an end: it takes too many steps for the length of the conversation",
            f"at most {STEPS:,}, and {STEPS_PER_CHARACTER} for each character",
            "use another chat template (data.chat_template)",
        )


def _require_room(characters: int) -> None:
    """Raise if an operation would make more characters than steps are left for."""
    if characters > _work.steps * CHARACTERS_PER_STEP:
        _spend(characters)


def _check_operands(operator: str, left: Any, right: Any) -> None:
    if operator == "%" and isinstance(left, str | bytes) and _WIDE_PERCENT.search(str(left)):
        raise _too_wide()
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_BITS:
            raise TemplateRuntimeError("it computes an integer of more than 1,200 digits")
    elif operator == "*":
        for count, values in ((left, right), (right, left)):
            if isinstance(count, int) and isinstance(values, str | bytes | list | tuple):
                _require_room(max(count, 0) * max(_measure(values), 1))


def _check_method(owner: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return the arguments of a method of a text or a number, whose result is not too large."""
    if name in _PADDING and any(isinstance(a, int) and a > MAX_WIDTH for a in (*args, *kwargs.values())):
        raise _too_wide()
    if name == "expandtabs":
        _require_room(len(owner) * MAX_WIDTH)
    elif name == "replace" and len(args) > 1:
        _require_room(len(owner) + owner.count(args[0]) * len(args[1]))
    elif name == "join" and args:
        args = (list(args[0]),)
        _require_room(_measure(args[0]) + len(owner) * len(args[0]))
    return args


def _too_wide() -> TemplateRuntimeError:
    return TemplateRuntimeError(f"it pads or indents a text by more than {MAX_WIDTH:,} characters")


def _count_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that counts its steps."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # the argument that is filtered

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        value: Any = args[first] if len(args) > first else None
        options = (*args[first + 1 :], *kwargs.values())
        if name in ("tojson", "indent", "batch", "round") and any(isinstance(o, str | int) and o for o in options):
            if any((len(o) if isinstance(o, str) else o) > 64 for o in options if isinstance(o, str | int)):
                raise _too_wide()
            _require_room(16 * _measure(value))
        elif name == "replace" and len(args) > first + 2:
            text = str(_to_text(value))
            _require_room(len(text) + text.count(str(args[first + 1])) * len(str(args[first + 2])))
        elif name == "format" and _WIDE_PERCENT.search(str(value)):
            raise _too_wide()
        elif name in ("join", "string", "sum") and not isinstance(value, str):
            value = list(value) if name == "join" else value
            separator = max((len(o) for o in options if isinstance(o, str)), default=0)
            _require_room(_measure(value) + separator * (len(value) if name == "join" else 0))
            args = (*args[:first], value, *args[first + 1 :])
        elif isinstance(value, list | tuple | dict | range):
            _spend(len(value) * CHARACTERS_PER_STEP)
        result = function(*args, **kwargs)
        _spend(len(result) if isinstance(result, str) else 0)
        return result

    return run


def _measure(value: Any) -> int:
    """Return about how many characters a value has as text; counting ends where no steps are left for more."""
    if isinstance(value, str):
        return len(value)
    total, left, most = 0, [value], _work.steps * CHARACTERS_PER_STEP
    while left and total <= most:
        one = left.pop()
        if isinstance(one, str):
            total += len(one)
        elif isinstance(one, dict):
            total += 8 * len(one)
            left += [*one, *one.values()]
        elif isinstance(one, list | tuple):
            total += 2 * len(one)
            left += one
        else:
            total += 8
    return total


def _to_text(value: Any) -> Any:
    """Return a value that a template writes; raise if it is no JSON value, whose text would be an address."""
    if isinstance(value, str | int | float | Undefined) or value is None:
        return value
    if not isinstance(value, list | tuple | dict):
        raise TemplateRuntimeError(f"it writes a value of the type {type(value).__name__}")
    _require_room(_measure(value))
    return str(value)


@pass_context
def _step(context: Context, value: Any) -> Any:
    _spend(0)
    return value


@pass_context
def _measure_value(context: Context, value: Any) -> Any:
    _spend(_measure(value))
    return value


@pass_context
def _concatenate(context: Context, values: list[Any]) -> str:
    text = "".join([value if type(value) is str else str(_to_text(value)) for value in values])
    _spend(len(text))
    return text


def _count_steps(tree: nodes.Template) -> None:
    """Insert the counting of steps: loops, macros, concatenations and lists that a template makes."""

    def call_filter(node: Any, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=1)

    def replace_in(node: nodes.Node) -> None:
        for field, value in list(node.iter_fields()):
            children = value if isinstance(value, list) else [value]
            for i, child in enumerate(children):
                if not isinstance(child, nodes.Node):
                    continue
                replace_in(child)
                counted = count(child)
                if counted is not child:
                    if isinstance(value, list):
                        value[i] = counted
                    else:
                        setattr(node, field, counted)
        if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
            node.body.insert(0, nodes.ExprStmt(call_filter(nodes.Const(None), "_step"), lineno=node.lineno))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = call_filter(node.test, "_step")
        if isinstance(node, nodes.AssignBlock):
            node.filter = call_filter(node.filter, "_measure")

    def count(node: nodes.Node) -> nodes.Node:
        if isinstance(node, nodes.Concat):
            return call_filter(nodes.List(node.nodes, lineno=node.lineno), "_concatenate")
        if isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
            constant = all(isinstance(child, nodes.Const | nodes.Pair) for child in node.iter_child_nodes())
            return node if constant and not isinstance(node, nodes.Dict) else call_filter(node, "_measure")
        return node

    replace_in(tree)
