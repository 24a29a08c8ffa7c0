"""A model's chat template: messages in, one prompt string out, by the rules that template authors write for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nbengine.errors import nearest

if TYPE_CHECKING:
    from pathlib import Path

    from jinja2.parser import Parser

REASONING = ("reasoning_content", "thinking", "reasoning")  # the names under which a message's reasoning is passed
EXAMPLE = "{'role': 'user', 'content': 'Hello'}"
CUT_MARK = "\ue0c5cut-here\ue0c5"  # stands after the text that the model is to continue; private use, so in no real message


def read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Every template of a model folder by name: files win over tokenizer_config.json; the usual one is `default`."""
    found = {path.stem: path.read_text("utf-8") for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (single := folder / "chat_template.jinja").is_file():
        found["default"] = single.read_text("utf-8")
    if found:
        return found
    stored = config.get("chat_template")
    if stored is None and (legacy := folder / "chat_template.json").is_file():
        stored = json.loads(legacy.read_text("utf-8")).get("chat_template")
    if isinstance(stored, str):
        return {"default": stored}
    return {entry["name"]: entry["template"] for entry in stored or ()}


class ChatTemplate:
    """Renders messages with a model's template, or with one given for the call.

    >>> ChatTemplate({"default": "{{ bos_token }}{{ messages[0].content }}"}, {"bos_token": "<s>"}).render([{"role": "user", "content": "Hi"}])
    '<s>Hi'
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self.templates = dict(templates)
        self.special_tokens = dict(special_tokens)
        self._environment = _environment()
        self._compiled: dict[str, _Compiled] = {}

    def source(self, chosen: str | None, *, tools: bool) -> str:
        """The template text: a name of the model's own, a whole template, or what the model uses by default."""
        if chosen is not None:
            return self.templates.get(chosen, chosen)
        if tools and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if "default" in self.templates:
            return self.templates["default"]
        if self.templates:
            raise ValueError(f"this model has several chat templates and no default: pass chat_template= one of {sorted(self.templates)}")
        raise ValueError(
            "this model has no chat template, so it does not say how a conversation becomes a prompt: "
            "pass chat_template='...' (Jinja text), or send a plain prompt with generate()"
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        tools: Sequence[dict[str, Any] | Callable[..., Any]] | None = None,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        if continue_final_message and add_generation_prompt:
            raise ValueError(
                "add_generation_prompt starts a new reply and continue_final_message goes on with the last one: pass "
                "add_generation_prompt=False with continue_final_message=True"
            )
        template = self._compile(self.source(chat_template, tools=bool(tools)))
        template.check_reads([*variables, *(["tools"] if tools else [])])
        chat = _plain_messages(messages, parts=template.takes_parts)
        mark = _Continuation(chat, continue_final_message) if continue_final_message else None
        values = {
            **self.special_tokens,
            "documents": None,
            **{name: _plain(value) for name, value in variables.items()},
            "messages": chat,
            "tools": [_plain(_schema(tool)) for tool in tools] if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = template.program.render(values)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template does not take these messages: {error}") from error
        return text if mark is None else mark.cut(text)

    def unread_fields(self, message: Mapping[str, Any], chat_template: str | None = None) -> list[str]:
        """Fields of a message that hold something, and that the template has no name for."""
        template = self._compile(self.source(chat_template, tools=False))
        if template.writes_whole_messages:
            return []
        return [name for name, value in message.items() if value not in (None, "", [], {}) and name not in template.fields]

    def _compile(self, source: str) -> _Compiled:
        if source not in self._compiled:
            try:
                program, tree = self._environment.from_string(source), self._environment.parse(source)
            except jinja2.TemplateError as error:
                raise ValueError(f"the chat template is no valid Jinja: {error}") from error
            self._compiled[source] = _Compiled(
                program,
                frozenset(meta.find_undeclared_variables(tree)),
                _goes_through_parts(tree),
                frozenset(_fields(tree)),
                _writes_whole_messages(tree),
            )
        return self._compiled[source]


@dataclasses.dataclass(frozen=True, slots=True)
class _Compiled:
    """A template, and what it makes use of."""

    program: jinja2.Template
    reads: frozenset[str]  # names that it looks up
    takes_parts: bool  # whether it goes through a content's parts itself, when that is a list
    fields: frozenset[str]  # every name by which it looks into anything
    writes_whole_messages: bool  # without naming their fields

    def check_reads(self, names: Sequence[str]) -> None:
        """Refuse what the template would ignore."""
        for name in names:
            if name not in self.reads:
                options = sorted(self.reads - {"messages", "add_generation_prompt", "documents", "tools"})
                known = f"; it reads {', '.join(options)}" if options else ""
                raise ValueError(
                    f"this chat template never reads {name!r}, so the model would not see it{nearest(name, options)}{known}: leave it out, "
                    "or pass a chat_template that has it"
                )


def _fields(tree: nodes.Template) -> Iterator[str]:
    """`message.role`, `message['role']`, `message.get('role')`, `'role' in message`."""
    yield from (one.attr for one in tree.find_all(nodes.Getattr))
    yield from (one.value for one in tree.find_all(nodes.Const) if isinstance(one.value, str))


def _writes_whole_messages(tree: nodes.Template) -> bool:
    """Whether it filters a message itself (`message | tojson`), or goes through its fields (`message.items()`)."""
    messages = {
        target.name
        for loop in tree.find_all(nodes.For)
        if any("messages" in name.name for name in loop.iter.find_all(nodes.Name)) or "messages" in getattr(loop.iter, "name", "")
        for target in (loop.target, *loop.target.find_all(nodes.Name))
        if isinstance(target, nodes.Name)
    }
    filtered = {getattr(one.node, "name", None) for one in tree.find_all(nodes.Filter)}
    gone_through = {getattr(one.node, "name", None) for one in tree.find_all(nodes.Getattr) if one.attr in {"items", "values", "keys"}}
    return bool(messages & (filtered | gone_through))


def _goes_through_parts(tree: nodes.Template) -> bool:
    """Whether there is a loop over something called `content`."""
    for loop in tree.find_all(nodes.For):
        over: Any = loop.iter
        while isinstance(over, nodes.Filter):
            over = over.node
        name = over.arg if isinstance(over, nodes.Getitem) else over
        if "content" in {getattr(name, field, None) for field in ("name", "attr", "value")}:
            return True
    return False


class _Continuation:
    """Marks the end of the last message's text, and cuts what the template wrote after it."""

    def __init__(self, chat: list[dict[str, Any]], field: bool | str) -> None:
        name = field if isinstance(field, str) else "content"
        message = chat[-1]
        text = message.get(name)
        if isinstance(text, list):
            block = next((part for part in reversed(text) if isinstance(part, dict) and "text" in part), {})
            self.text = block.get("text")
            block["text"] = f"{self.text}{CUT_MARK} "
        else:
            self.text = text
            for alias in REASONING if name in REASONING else (name,):
                if message.get(alias) == text:
                    message[alias] = f"{text}{CUT_MARK} "
        if self.text is None:
            raise ValueError(f"continue_final_message needs a last message with text in {name!r}, and it has none")

    def cut(self, rendered: str) -> str:
        at = rendered.rfind(CUT_MARK)
        if at < 0:
            raise ValueError("this chat template drops the last message's text, so continue_final_message cannot be used with it")
        # the space behind the mark is gone when the template trims messages: trim what stands before it, too
        trimmed = not rendered.startswith(" ", at + len(CUT_MARK))
        return rendered[:at].rstrip() if trimmed else rendered[:at]


def _plain_messages(messages: Any, *, parts: bool) -> list[dict[str, Any]]:
    """Fresh copies of the messages, checked; contents given in parts are joined unless the template goes through parts."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise TypeError(f"messages must be a list of {EXAMPLE} dicts, not {type(messages).__name__}")
    if not messages:
        raise ValueError(f"the conversation is empty: pass at least one message, such as {EXAMPLE}")
    chat = []
    for index, given in enumerate(messages):
        message = _plain(given)
        if not isinstance(message, dict):
            raise TypeError(f"a message is a dict such as {EXAMPLE}, not {type(given).__name__}")
        message = {key: value for key, value in message.items() if value is not None}  # clients send content=None beside tool_calls
        _check_message(f"message {index}", message, parts=parts)
        thought = next((message[name] for name in REASONING if name in message), None)
        chat.append(message if thought is None else {"thinking": thought, **message, "reasoning_content": thought})
    return chat


def _check_message(what: str, message: dict[str, Any], *, parts: bool) -> None:
    if not isinstance(message.get("role"), str):
        wrong = f"has role {message['role']!r}, which is no string" if "role" in message else "has no role"
        raise (TypeError if "role" in message else ValueError)(f"{what} {wrong}: write it as {EXAMPLE}")
    what += f" (of the {message['role']})"
    if "content" not in message:
        if not any(name in message for name in ("tool_calls", "function_call", *REASONING)):
            raise ValueError(f"{what} has no content: write it as {EXAMPLE}")
        return
    content = message["content"]
    if isinstance(content, list | tuple):
        texts = [_text_of(what, part) for part in content]
        message["content"] = [{"type": "text", "text": text} for text in texts] if parts else "\n".join(texts)  # as vLLM joins them
    elif not isinstance(content, str):
        raise TypeError(
            f"{what} has a content of type {type(content).__name__}: pass a string (json.dumps() of data), or a list of text parts"
        )


def _text_of(what: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise TypeError(f"{what} has a part that is {part!r}: a part is {{'type': 'text', 'text': ...}}")
    kind = part.get("type", "text")
    if kind != "text":
        raise ValueError(f"{what} has a part of type {kind!r}, and this engine takes text only: pass parts {{'type': 'text', 'text': ...}}")
    if not isinstance(part.get("text"), str):
        raise TypeError(f"{what} has a text part whose text is {part.get('text')!r}: write it as {{'type': 'text', 'text': ...}}")
    return part["text"]


def _plain(value: Any) -> Any:
    """A fresh copy in JSON's types: a template is code from the hub and gets no object with methods."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value if type(value) is str else str.__str__(value)
    if isinstance(value, int | float):
        kind = int if isinstance(value, int) else float
        return value if type(value) is kind else kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if callable(dump := getattr(value, "model_dump", None)):
        return _plain(dump())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return f"<{type(value).__name__}>"


def _schema(tool: Any) -> Any:
    if isinstance(tool, Mapping) or callable(getattr(tool, "model_dump", None)):
        return tool
    if callable(tool):
        from transformers.utils import get_json_schema  # reads the function's annotations and docstring

        return get_json_schema(tool)
    raise TypeError(f"a tool is a JSON schema (dict) or a documented function, not {type(tool).__name__}")


class _GenerationTag(Extension):
    """`{% generation %}` marks the model's own words for training; here it only has to be understood."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # noqa: DTZ005 - the user's own clock is what templates mean
