"""`%engine`, `%%generate` and `%%chat`: each parses, calls and displays."""

from __future__ import annotations

import argparse
import logging
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

import traitlets
from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, line_magic, magics_class, no_var_expand
from IPython.display import display

from nbengine.engine import Engine
from nbengine.errors import NBEngineError
from nbengine.notebook import prompts, watch
from nbengine.notebook.conversation import Conversation
from nbengine.notebook.engine_commands import EngineCommands, engine_help
from nbengine.notebook.fill import fill, users_variables
from nbengine.notebook.generation import Generation
from nbengine.notebook.live import View, view_of
from nbengine.notebook.options import STYLES, chat_parser, generate_parser, sampling_values
from nbengine.notebook.session import Session, checked_name
from nbengine.notebook.views import open_view, view_parser

log = logging.getLogger("nbengine")
SAID = (NBEngineError, ValueError, TypeError, MemoryError, FileNotFoundError)  # whose messages say all that a person needs
Start = Callable[[], tuple[Generation, View | None]]


def in_one_line(error: BaseException) -> UsageError:
    """The same as one line under the cell, with nothing of the engine attached to it; the log has where it came from."""
    log.info("a cell failed:\n%s", "".join(traceback.format_exception(error)).rstrip())
    return UsageError(str(error) or type(error).__name__)


@magics_class
class NBEngineMagics(Magics):
    """An LLM inference engine in this kernel. `%config NBEngineMagics` lists these defaults and sets them."""

    model = traitlets.Unicode("", help="a model that a cell loads when no engine is; empty: say so instead").tag(config=True)
    max_tokens = traitlets.Int(256, min=1, help="most tokens of an output where a cell does not say").tag(config=True)
    temperature = traitlets.Float(None, allow_none=True, help="temperature where a cell does not say; None: the model's own default").tag(
        config=True
    )
    format = traitlets.Enum(STYLES, default_value="text", help="how text is shown: text, markdown or json").tag(config=True)
    load_options = traitlets.Unicode("", help="options that every `%engine load` begins with").tag(config=True)

    def __init__(self, shell: Any) -> None:
        super().__init__(shell=shell)
        self.adopt(Session(shell))

    def adopt(self, session: Session) -> None:
        """Go on with the engines and conversations of this session."""
        self.session = session
        self.commands = EngineCommands(session)

    # ── magics ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @no_var_expand
    @line_magic
    def engine(self, line: str) -> Any:
        try:
            return self.commands.run(line, self.load_options)
        except SAID as error:
            said = in_one_line(error)
        raise said

    @no_var_expand
    @line_cell_magic
    def generate(self, line: str, cell: str | None = None) -> Generation:
        return self._wait(lambda: self._generate(line, cell))

    @no_var_expand
    @line_cell_magic
    def chat(self, line: str, cell: str | None = None) -> Any:
        if cell is None:
            return self._chat_command(line)
        return self._wait(lambda: self._chat(line, cell))

    @no_var_expand
    @line_magic
    def blocks(self, line: str) -> Any:
        return self._view("blocks", line)

    @no_var_expand
    @line_magic
    def dashboard(self, line: str) -> Any:
        return self._view("dashboard", line)

    @no_var_expand
    @line_magic
    def timeline(self, line: str) -> Any:
        return self._view("timeline", line)

    def awaited(self, name: str, line: str, cell: str | None) -> Awaitable[Generation]:
        """`%%generate` or `%%chat` for a cell that awaits it, so that the kernel can listen meanwhile."""
        return self._wait_awaited(lambda: self._generate(line, cell) if name == "generate" else self._chat(line, cell or ""))

    # ── starting ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _generate(self, line: str, cell: str | None) -> tuple[Generation, View | None]:
        parser = generate_parser()
        given, text = parser.parse_head(line) if cell is None else (parser.parse_line(line), cell.removesuffix("\n"))
        if not text.strip() and not given.each:
            raise UsageError("%%generate: there is no prompt: write it in the cell, under the options")
        engine = self._engine(given.engine)
        variables = users_variables(self.shell)
        if given.each:
            texts = prompts.for_each(text, given.each, variables, raw=given.raw)
        else:
            texts = [text if given.raw else fill(text, variables)]
        chat = prompts.wants_chat(engine, asked=given.chat, system=given.system)
        asked = [prompts.answer_to(engine, prompts.with_system(one, given.system)) if chat else one for one in texts]
        return self._start(given, engine, asked, texts)

    def _chat(self, line: str, cell: str) -> tuple[Generation, View | None]:
        given = chat_parser().parse_line(line)
        text = cell.removesuffix("\n")
        if not text.strip():
            raise UsageError(
                "%%chat: there is no message: write it in the cell, under the options; `%chat`, with one sign, shows a conversation"
            )
        engine = self._engine(given.engine)
        if not prompts.has_template(engine):
            raise UsageError(f"{engine.config.model} has no chat template: use %%generate")
        text = text if given.raw else fill(text, users_variables(self.shell))
        conversation = self.session.conversations.open(given.name)
        conversation.check_ready()
        messages = _with_message(conversation, text, given)
        generation, view = self._start(given, engine, [prompts.answer_to(engine, messages)], [text])
        conversation.await_answer(messages, generation)
        return generation, view

    def _start(self, given: argparse.Namespace, engine: Engine, asked: list[Any], texts: list[str]) -> tuple[Generation, View | None]:
        """Queue, bind, show: in this order, and an interrupt comes before or after all of it."""
        out = checked_name(self.session.shell, given.out)
        values = sampling_values(given)
        if self.temperature is not None:
            values.setdefault("temperature", self.temperature)
        generation = view = None
        with watch.ends_what_is_queued(lambda: generation), watch.interrupts_held():
            generation = self.session.generate(
                engine, asked, values,
                max_tokens=self.max_tokens, priority=given.priority,
                prompts=texts, style=given.format or self.format, show_tokens=given.logprobs is not None,
            )  # fmt: skip
            if out is not None:
                self.session.bind(out, generation)
            view = view_of(generation)
        if given.bg:
            generation.background = True
            self.session.pump.add(generation, view)
            return generation, None
        return generation, view

    def _engine(self, name: str | None) -> Engine:
        if name is None and not self.session.engines and self.model:
            self.commands.run(f"load {self.model}", self.load_options)
        return self.session.engines.find(name, self.session.shell.user_ns)

    def _view(self, name: str, line: str) -> Any:
        try:
            return open_view(self.session, name, line, self.session.shell.user_ns)
        except SAID as error:
            said = in_one_line(error)
        raise said

    # ── waiting ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _wait(self, start: Start) -> Generation:
        generation, view = _said(start)
        if view is not None:
            watch.wait_here(generation, view, self.session.pump)
        return generation

    async def _wait_awaited(self, start: Start) -> Generation:
        generation, view = _said(start)
        if view is not None:
            await watch.wait_awaited(generation, view, self.session.pump)
        return generation

    # ── conversations ───────────────────────────────────────────────────────────────────────────────────────────────

    def _chat_command(self, line: str) -> Conversation | None:
        """`%chat`, `%chat list`, `%chat show NAME`, `%chat reset NAME`, `%chat undo NAME`, `%chat fork NAME NEW`."""
        command, *names = line.split() or ["show"]
        conversations = self.session.conversations
        name = names[0] if names else None
        match command, len(names):
            case "show", 0 | 1:
                return conversations.find(name)
            case "list", 0:
                listed = [f"{name}: {count} messages" for name, count in conversations.listed().items()]
                display({"text/plain": "\n".join(listed) or "no conversations yet"}, raw=True)
            case "reset", 0 | 1:
                conversations.find(name).reset()
            case "undo", 0 | 1:
                conversation = conversations.find(name)
                conversation.undo()
                return conversation
            case "fork", 2:
                return conversations.fork(names[0], names[1])
            case _:
                raise UsageError(
                    "%chat: use `%chat show [NAME]`, `list`, `reset [NAME]`, `undo [NAME]` or `fork NAME NEW`; a message is written in a %%chat cell"
                )
        return None


def _with_message(conversation: Conversation, text: str, given: argparse.Namespace) -> list[prompts.Message]:
    """The conversation with this message at its end; nothing is changed in it yet."""
    messages = [dict(message) for message in conversation.messages]
    if given.system:
        messages = [{"role": "system", "content": given.system}, *(m for m in messages if m["role"] != "system")]
    if given.edit is not None:
        if 0 <= given.edit < len(messages) and messages[given.edit]["role"] != "user":
            raise UsageError(
                f"%%chat: message {given.edit} is not one of yours, which alone can be answered anew: change it in `.messages` of `c = %chat show`"
            )
        return Conversation(conversation.name, messages).edited(given.edit, text)
    return [*messages, {"role": "user", "content": text}]


def _said(start: Start) -> tuple[Generation, View | None]:
    """Start, with what goes wrong said in one line."""
    try:
        return start()
    except SAID as error:
        said = in_one_line(error)
    raise said


NBEngineMagics.engine.__doc__ = engine_help()
NBEngineMagics.generate.__doc__ = generate_parser().format_help()
NBEngineMagics.blocks.__doc__ = view_parser("blocks").format_help()
NBEngineMagics.dashboard.__doc__ = view_parser("dashboard").format_help()
NBEngineMagics.timeline.__doc__ = view_parser("timeline").format_help()
NBEngineMagics.chat.__doc__ = (
    chat_parser().format_help() + "\n`%chat` alone: show [NAME], list, reset [NAME], undo [NAME], fork NAME NEW.\n"
)
