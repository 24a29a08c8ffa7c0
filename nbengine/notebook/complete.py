"""Tab completion: options, models, engines, request ids, conversations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbengine.notebook.engine_commands import PARSERS
from nbengine.notebook.options import STYLES, Parser, chat_parser, generate_parser
from nbengine.notebook.views import VIEWS, view_parser
from nbengine.policy import policies

if TYPE_CHECKING:
    from nbengine.notebook.session import Session

KEYS = ("%%generate", "%generate", "%%chat", "%chat", "%engine", *(f"%{name}" for name in VIEWS))
CHOICES = {
    "--format": STYLES,
    "--dtype": ("auto", "float32", "bfloat16", "float16"),
    "--device": ("auto", "cpu", "cuda"),
    "--load-format": ("auto", "safetensors", "dummy"),
    "--scheduling-policy": tuple(policies),
}
CHATS = ("show", "list", "reset", "undo", "fork")


class Completer:
    """A `complete_command` hook for each of the magics."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def attach(self, shell: Any) -> None:
        self.detach(shell)
        for key in KEYS:
            shell.set_hook("complete_command", self, str_key=key)

    @staticmethod
    def detach(shell: Any) -> None:
        hooks = shell.strdispatchers.get("complete_command")
        for key in KEYS if hooks is not None else ():
            hooks.strs.pop(key, None)

    def __call__(self, shell: Any, event: Any) -> list[str]:
        """What may come at the cursor; the hook's own protocol."""
        before = event.text_until_cursor.split()
        at_word = event.symbol if not event.text_until_cursor.endswith(" ") else ""
        done = before if not at_word else before[:-1]
        return [word for word in self.words(done, shell) if word.startswith(before[-1] if at_word else "")]

    def words(self, done: list[str], shell: Any) -> list[str]:
        """What may follow these words of a line."""
        last = done[-1]
        if last in CHOICES:
            return list(CHOICES[last])
        if last in {"-e", "--engine"}:
            return list(self._session.engines)
        if last == "--each":
            return [
                name
                for name, value in shell.user_ns.items()
                if not name.startswith("_") and (isinstance(value, list | tuple) or hasattr(value, "__array__"))
            ]
        if done[0] in {"%%generate", "%generate"}:
            return generate_parser().names()
        if done[0] == "%%chat":
            return [*self._session.conversations, *chat_parser().names()]
        if done[0] == "%chat":
            return list(CHATS) if len(done) == 1 else list(self._session.conversations)
        if done[0].lstrip("%") in VIEWS:
            return [*self._session.engines, *view_parser(done[0].lstrip("%")).names()]
        return self._engine(done[1:])

    def _engine(self, done: list[str]) -> list[str]:
        if not done:
            return [*PARSERS, "help"]
        command = done[0]
        if command == "help":
            return list(PARSERS)
        if command not in PARSERS:
            return []
        parser: Parser = PARSERS[command]()
        return [*self._arguments(command, done[1:]), *parser.names()]

    def _arguments(self, command: str, given: list[str]) -> list[str]:
        if given:
            return []
        if command in {"load", "plan"}:
            return self._models()
        if command in {"unload", "use", "status", "serve", "unserve"}:
            return list(self._session.engines)
        if command == "cancel":
            return [request for engine in self._session.engines.values() for request in engine.request_ids()]
        return []

    @staticmethod
    def _models() -> list[str]:
        from nbengine.local_models import local_models

        return [model.name for model in local_models()]
