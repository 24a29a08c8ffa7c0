"""Conversations that keep their history under a name."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError

from nbengine.errors import nearest
from nbengine.notebook.prompts import Message
from nbengine.notebook.render import QUIET, as_html

if TYPE_CHECKING:
    from nbengine.notebook.generation import Generation


class Conversation:
    """Messages in order; `.messages` is a plain list of {"role": ..., "content": ...}, to be read and edited."""

    def __init__(self, name: str, messages: list[Message] | None = None) -> None:
        self.name = name
        self._messages: list[Message] = messages or []
        self._pending: tuple[list[Message], Generation] | None = None  # what it becomes when this has ended

    @property
    def messages(self) -> list[Message]:
        """The messages so far; an answer joins them when it has ended, with as much of it as there is."""
        if self._pending is not None and self._pending[1].done:
            (messages, generation), self._pending = self._pending, None
            text = generation.text
            self._messages[:] = [*messages, *([{"role": "assistant", "content": text}] if text else [])]
        return self._messages

    def await_answer(self, messages: list[Message], generation: Generation) -> None:
        """Become these messages and what is generated after them."""
        self._pending = (messages, generation)

    def check_ready(self) -> None:
        """Refuse while an answer is still being written."""
        _ = self.messages  # lets an answer that has ended join
        if self._pending is not None:
            raise UsageError(f"{self.name} is still being answered: wait for it, or stop it with `%engine cancel`")

    def fork(self, name: str) -> Conversation:
        """A copy under another name, which goes its own way from here."""
        self.check_ready()
        return Conversation(name, [dict(message) for message in self.messages])

    def reset(self) -> None:
        """Forget all messages."""
        self.check_ready()
        self.messages.clear()

    def undo(self) -> None:
        """Take the last question and its answer back."""
        self.check_ready()
        messages = self.messages
        while messages and messages.pop()["role"] != "user":
            pass

    def edited(self, index: int, content: str) -> list[Message]:
        """The messages with new content in place of message `index`, and nothing after it."""
        if not 0 <= index < len(self.messages):
            raise UsageError(f"{self.name} has no message {index}: it has {len(self.messages)}, from 0 on (`%chat show {self.name}`)")
        return [*self.messages[:index], {**self.messages[index], "content": content}]

    def __len__(self) -> int:
        return len(self.messages)

    def __repr__(self) -> str:
        lines = [f"[{i}] {m['role']}: {m['content']}" for i, m in enumerate(self.messages)]
        return "\n".join(lines + self._coming()) or f"({self.name} is empty)"

    def _coming(self) -> list[str]:
        """The question that is being answered."""
        return [] if self._pending is None else [f"(being answered: {self._pending[0][-1]['content']})"]

    def _repr_html_(self) -> str:
        head = f'<div style="{QUIET}">{escape(self.name)}, {len(self)} messages</div>'
        coming = "".join(f'<div style="{QUIET}">{as_html(line)}</div>' for line in self._coming())
        said = "".join(
            f"<div><b>{i} {escape(str(m['role']))}</b>&ensp;{as_html(str(m['content']))}</div>" for i, m in enumerate(self.messages)
        )
        return head + said + coming


class Conversations(dict[str, Conversation]):
    """The conversations of one shell; the last one used is the current one."""

    def __init__(self) -> None:
        super().__init__()
        self.current = "chat"

    def open(self, name: str | None) -> Conversation:
        """The conversation of this name, a new one if there is none."""
        name = name or self.current
        if not name.isidentifier():
            raise UsageError(f"a conversation's name must be like a variable's, not {name!r}")
        self.current = name
        return self.setdefault(name, Conversation(name))

    def find(self, name: str | None) -> Conversation:
        """The conversation of this name, which must be there."""
        name = name or self.current
        if name not in self:
            raise UsageError(f"there is no conversation {name!r}{nearest(name, self)}; there are: {', '.join(self) or 'none yet'}")
        self.current = name
        return self[name]

    def fork(self, name: str, new: str) -> Conversation:
        if new in self:
            raise UsageError(f"there is a conversation {new!r} already: `%chat reset {new}` it, or take another name")
        copy = self.find(name).fork(new)
        self.open(new)
        self[new] = copy
        return copy

    def listed(self) -> dict[str, Any]:
        """Names and how many messages each has."""
        return {name: len(conversation) for name, conversation in self.items()}
