"""The commands of `%engine`: one method each, with its own options."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.display import display

from nbengine.engine import Engine
from nbengine.errors import nearest
from nbengine.holders import explain, forget_traceback, holders
from nbengine.notebook.load_view import load_engine
from nbengine.notebook.options import Parser, add_config_options, at_least_one, config_values, words
from nbengine.notebook.session import Session, checked_name
from nbengine.notebook.status import Status
from nbengine.serve.cli_options import add_serve_options, serve_values

if TYPE_CHECKING:
    import argparse

    from nbengine.serve.server import Server

LINES = 20  # of the log, unless told


class EngineCommands:
    """What `%engine COMMAND` does to a session. Each method's docstring is its help."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.parsers = {name: parser() for name, parser in PARSERS.items()}

    def run(self, line: str, load_options: str = "") -> Any:
        """Run one command line; what it returns is the cell's value."""
        command, *rest = words(line) or ["status"]
        if command in {"help", "-h", "--help"}:
            return _show(self.help(*rest[:1]))
        if command not in PARSERS:
            raise UsageError(f"%engine: no command {command!r}{nearest(command, PARSERS)}; `%engine help` lists them")
        given = self.parsers[command].parse_args([*words(load_options), *rest] if command == "load" else rest)
        return _method(command)(self, given)

    def help(self, command: str | None = None) -> str:
        """All commands in a line each, or one with its options."""
        if command is None:
            return engine_help()
        if command not in PARSERS:
            raise UsageError(f"%engine: no command {command!r}{nearest(command, PARSERS)}")
        return f"{_doc(command)}\n\n{self.parsers[command].format_help()}"

    # ── coming and going ────────────────────────────────────────────────────────────────────────────────────────────

    def do_load(self, given: argparse.Namespace) -> Engine:
        """Load a model and make it the current engine; one of the same name is closed first."""
        name = given.name or re.split(r"[/\\]", given.model.rstrip("/\\"))[-1]
        values, out = config_values(given), checked_name(self.session.shell, given.out)
        _check(given.model, values)
        if name in self.session.engines:
            self.session.engines.remove(name).close()
        try:
            engine = load_engine(given.model, values, name)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
                raise
            told = str(error)
        else:
            self.session.engines.add(name, engine)
            if out is not None:
                self.session.bind(out, engine)
            return engine
        raise UsageError(f"{told}\n{explain(holders(_device(given), self.session.engines, self.session.shell.user_ns))}")

    def do_unload(self, given: argparse.Namespace) -> None:
        """Close an engine (the current one; --all: every one) and give its memory back."""
        for name in list(self.session.engines) if given.all else [self._name(given.name)]:
            engine = self.session.engines.remove(name)
            memory = engine.info.memory
            engine.close()
            forget_traceback()
            _show(f"unloaded {name}: {_size(memory.weights + memory.kv_cache)} given back")

    def do_use(self, given: argparse.Namespace) -> None:
        """Make an engine the current one: a loaded one by name, or one that a variable of yours holds."""
        if given.name not in self.session.engines:
            engine = self.session.engines.find(given.name, self.session.shell.user_ns)
            self.session.engines.add(given.name, engine, owned=False)
        self.session.engines.use(given.name)
        _show(f"{given.name} is the current engine")

    def do_serve(self, given: argparse.Namespace) -> Server:
        """Answer OpenAI clients with an engine; it stays until `%engine unserve`, or until the engine is unloaded."""
        name = given.name or self.session.engines.current
        engine = self.session.engines.find(given.name, self.session.shell.user_ns)
        values, out = serve_values(given), checked_name(self.session.shell, given.out)
        if "served_model_name" not in values:
            from nbengine.serve.server import names_of

            values["served_model_name"] = list(
                dict.fromkeys([*names_of(engine.config.model), *([name] if name in self.session.engines else [])])
            )
        server = engine.serve(**values)
        if out is not None:
            self.session.bind(out, server)
        return server

    def do_unserve(self, given: argparse.Namespace) -> None:
        """Close the servers of an engine; the engine goes on."""
        closed = self.session.engines.find(given.name, self.session.shell.user_ns).unserve()
        _show(f"{closed} server{'s' * (closed != 1)} closed")

    # ── looking ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def do_status(self, given: argparse.Namespace) -> Status:
        """Show every engine: model, device, memory, blocks, requests."""
        if given.name is not None:
            return Status({given.name: self.session.engines.find(given.name, self.session.shell.user_ns)}, given.name)
        return Status(dict(self.session.engines.items()), self.session.engines.current)

    def do_models(self, given: argparse.Namespace) -> Any:  # noqa: ARG002 - as its neighbours
        """List the models that are on this machine, and which of them are loaded."""
        from nbengine.local_models import local_models
        from nbengine.notebook.status import ModelList

        return ModelList(local_models(), {name: engine.config.model for name, engine in self.session.engines.items()})

    def do_plan(self, given: argparse.Namespace) -> Any:
        """Work out what would fit before anything is loaded: weights, KV cache, sequences."""
        from nbengine.model_plan import plan_model

        return plan_model(given.model, **config_values(given))

    def do_log(self, given: argparse.Namespace) -> None:
        """Show the last lines of the log."""
        lines = list(self.session.log.lines)[-given.lines :]
        _show("\n".join(lines) or "the log is empty")

    # ── control ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def do_pause(self, given: argparse.Namespace) -> None:
        """Stop an engine between two steps."""
        self._engine(given).pause()
        _show("paused: `%engine step` moves it by hand, `%engine resume` lets it go on")

    def do_step(self, given: argparse.Namespace) -> Any:
        """Move a paused engine by N steps, and say what they did."""
        from nbengine.notebook.status import Steps

        engine = self._engine(given)
        if engine.status not in {"paused", "asleep", "closed", "dead"}:
            raise UsageError("%engine step: it moves a paused engine by hand: `%engine pause` first")
        return Steps(engine.step(given.steps), kept=engine.trace.capacity > 0)

    def do_resume(self, given: argparse.Namespace) -> None:
        """Let a paused engine go on."""
        engine = self._engine(given)
        was = engine.status
        engine.resume()
        _show("goes on" if was == "paused" else f"it was not paused: it is {engine.status}")

    def do_sleep(self, given: argparse.Namespace) -> None:
        """Give the KV cache back (--level 2: the weights too); requests wait until `%engine wake`."""
        engine = self._engine(given)
        engine.sleep(given.level)
        memory = engine.info.memory
        _show(f"asleep: {_size(memory.kv_cache + (memory.weights if given.level == 2 else 0))} given back; `%engine wake` takes it again")

    def do_wake(self, given: argparse.Namespace) -> None:
        """Undo `%engine sleep`; what was running goes on."""
        engine = self._engine(given)
        was = engine.status
        engine.wake_up()
        _show("awake again" if was == "asleep" else f"it was not asleep: it is {engine.status}")

    def do_cancel(self, given: argparse.Namespace) -> None:
        """End what runs: one request by its id, or everything that runs (--all: of every engine)."""
        engines = self.session.engines
        if given.id is not None:
            holder = [engine for engine in engines.values() if given.engine is None and given.id in engine.request_ids()]
            (holder[0] if len(holder) == 1 else self._engine(given)).cancel(given.id)
            _show(f"{given.id} is cancelled")
            return
        count = sum(engine.cancel_all() for engine in (list(engines.values()) if given.all else [self._engine(given)]))
        _show(f"{count} request{'s' * (count != 1)} cancelled")

    def do_reset_cache(self, given: argparse.Namespace) -> None:
        """Forget every cached prefix."""
        self._engine(given).reset_prefix_cache()
        _show("the prefix cache is empty")

    def _engine(self, given: argparse.Namespace) -> Engine:
        return self.session.engines.find(given.engine, self.session.shell.user_ns)

    def _name(self, name: str | None) -> str:
        self.session.engines.find(name)
        return name or self.session.engines.current or ""


# ── options ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _parser(
    command: str, *arguments: tuple[tuple[str, ...], dict[str, Any]], add: Callable[[Parser], None] | None = None
) -> Callable[[], Parser]:
    def make() -> Parser:
        parser = Parser(prog=f"%engine {command}", usage=f"%(prog)s [options]{''.join(f' {_shown(*a)}' for a in arguments)}")
        for names, settings in arguments:
            parser.add_argument(*names, **settings)
        if add is not None:
            add(parser)
        return parser

    return make


def _shown(names: tuple[str, ...], settings: dict[str, Any]) -> str:
    """An argument in the usage line; options are told below it."""
    name = str(settings.get("metavar", names[0]))
    return "" if names[0].startswith("-") else f"[{name}]" if settings.get("nargs") == "?" else name


MODEL = (("model",), {"help": "a folder, a hub id such as Qwen/Qwen3-0.6B, or tales"})
NAME = (("name",), {"nargs": "?", "help": "an engine's name; the current one"})
ENGINE = (("-e", "--engine"), {"metavar": "NAME", "help": "an engine's name; the current one"})
ALL = (("--all",), {"action": "store_true", "help": "every engine"})

PARSERS: dict[str, Callable[[], Parser]] = {
    "load": _parser(
        "load",
        MODEL,
        (("--name",), {"help": "what to call it; the model's own name"}),
        (("-o", "--out"), {"metavar": "NAME", "help": "bind the engine to this variable"}),
        add=add_config_options,
    ),
    "unload": _parser("unload", NAME, ALL),
    "serve": _parser(
        "serve", NAME, (("-o", "--out"), {"metavar": "NAME", "help": "bind the server to this variable"}), add=add_serve_options
    ),
    "unserve": _parser("unserve", NAME),
    "use": _parser("use", (("name",), {"help": "an engine's name, or a variable that holds one"})),
    "status": _parser("status", NAME),
    "models": _parser("models"),
    "plan": _parser("plan", MODEL, add=add_config_options),
    "log": _parser("log", (("lines",), {"nargs": "?", "type": at_least_one, "metavar": "N", "default": LINES, "help": "how many"})),
    "pause": _parser("pause", ENGINE),
    "step": _parser("step", (("steps",), {"nargs": "?", "type": int, "default": 1, "metavar": "N", "help": "how many steps"}), ENGINE),
    "resume": _parser("resume", ENGINE),
    "sleep": _parser("sleep", (("--level",), {"type": int, "choices": (1, 2), "default": 1}), ENGINE),
    "wake": _parser("wake", ENGINE),
    "cancel": _parser("cancel", (("id",), {"nargs": "?", "metavar": "ID", "help": "a request's id"}), ALL, ENGINE),
    "reset-cache": _parser("reset-cache", ENGINE),
}


# ── help ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def engine_help() -> str:
    """Every command in a line."""
    width = max(map(len, PARSERS))
    lines = [f"%engine {name:{width}}  {_doc(name)}" for name in PARSERS]
    return "\n".join([*lines, "", "`%engine help COMMAND` has the options of one. Without a command, `%engine` shows the status."])


def _method(command: str) -> Callable[[EngineCommands, argparse.Namespace], Any]:
    method: Callable[[EngineCommands, argparse.Namespace], Any] = getattr(EngineCommands, "do_" + command.replace("-", "_"))
    return method


def _doc(command: str) -> str:
    return (_method(command).__doc__ or "").strip()


# ── what they share ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _show(text: str) -> None:
    display({"text/plain": text}, raw=True)


def _check(model: str, values: dict[str, Any]) -> None:
    """Refuse what cannot be loaded while an engine of the same name still runs."""
    from nbengine.config import EngineConfig
    from nbengine.hub import resolve_model

    config = EngineConfig.of(model, **values)
    resolve_model(config.model, revision=config.revision, download_dir=config.download_dir, token=config.hf_token, weights=False)


def _size(count: int) -> str:
    from nbengine.memory import size

    return size(count)


def _device(given: argparse.Namespace) -> str:
    import torch

    asked = given.device or "auto"
    return str(asked) if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
