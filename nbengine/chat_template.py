"""A model's chat template: messages in, one prompt string out, by the rules that template authors write for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from pathlib import Path

    from jinja2.parser import Parser

REASONING = ("reasoning_content", "thinking", "reasoning")  # the names under which a message's reasoning is passed
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

    >>> ChatTemplate({"default": "{{ bos_token }}{{ messages[0].content }}"}, {"bos_token": "<s>"}).render([{"content": "Hi"}])
    '<s>Hi'
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self.templates = dict(templates)
        self.special_tokens = dict(special_tokens)
        self._environment = _environment()
        self._compiled: dict[str, jinja2.Template] = {}

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
        source = self.source(chat_template, tools=tools is not None)
        chat = _plain_messages(messages)
        mark = _Continuation(chat, continue_final_message) if continue_final_message else None
        values = {
            **self.special_tokens,
            "documents": None,
            **{name: _plain(value) for name, value in variables.items()},
            "messages": chat,
            "tools": None if tools is None else [_plain(_schema(tool)) for tool in tools],
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._compile(source).render(values)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template does not take these messages: {error}") from error
        return text if mark is None else mark.cut(text)

    def _compile(self, source: str) -> jinja2.Template:
        if source not in self._compiled:
            self._compiled[source] = self._environment.from_string(source)
        return self._compiled[source]


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


def _plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if not messages:
        raise ValueError("the conversation is empty: pass at least one message, such as {'role': 'user', 'content': 'Hello'}")
    chat = []
    for given in messages:
        message = _plain(given)
        if not isinstance(message, dict):
            raise TypeError(f"a message is a dict such as {{'role': 'user', 'content': 'Hello'}}, not {type(given).__name__}")
        message = {key: value for key, value in message.items() if value is not None}  # clients send content=None beside tool_calls
        thought = next((message[name] for name in REASONING if name in message), None)
        chat.append(message if thought is None else {"thinking": thought, **message, "reasoning_content": thought})
    return chat


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
