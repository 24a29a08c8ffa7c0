"""`python -m nbengine.serve MODEL`: one model behind an OpenAI endpoint, until it is interrupted or terminated."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import weakref
from typing import TYPE_CHECKING, Any, NoReturn

from nbengine.errors import NBEngineError
from nbengine.serve.cli_options import add_serve_options, serve_values
from nbengine.serve.latency import Latency
from nbengine.serve.traffic import Traffic

if TYPE_CHECKING:
    from nbengine.serve.serve_options import ServeOptions

LOG_LEVELS = ("debug", "info", "warning", "error")


def main(argv: list[str] | None = None) -> int:
    """The whole command; its exit status."""
    from nbengine.notebook.options import CommandParser, add_config_options, config_values
    from nbengine.serve.serve_options import ServeOptions

    parser = CommandParser(prog="python -m nbengine.serve", description=__doc__)
    parser.add_argument("model", help="a folder, a hub id such as Qwen/Qwen3-0.6B, or tales")
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="info")
    add_serve_options(parser.add_argument_group("server"))  # type: ignore[arg-type]
    add_config_options(parser.add_argument_group("engine"))  # type: ignore[arg-type]
    given = parser.parse_args(argv)
    logging.basicConfig(level=given.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for name in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(name) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(name, _stop)
    try:
        options = ServeOptions.of(**serve_values(given))
        serve(given.model, config_values(given), options)
    except KeyboardInterrupt:
        return 0
    except (NBEngineError, ValueError, TypeError, OSError, MemoryError) as error:
        sys.stderr.write(f"nbengine.serve: {error}\n")
        return 1
    return 0


def _stop(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def serve(model: str, config: dict[str, Any], options: ServeOptions) -> None:
    """Listen first, which says that the model is being loaded, then load it, then answer."""
    from nbengine.config import EngineConfig
    from nbengine.engine import Engine
    from nbengine.front import Front
    from nbengine.serve.listener import Listener
    from nbengine.serve.server import names_of

    EngineConfig.of(model, **config)  # bad options are told before anything listens
    with contextlib.closing(Front("nbengine-serve")) as front:
        listener = Listener(front, options, options.names or names_of(model), Traffic(), Latency())
        with contextlib.closing(listener):
            listener.open("loading")
            where = listener.url or f"unix:{options.uds}"
            _say(f"listening at {where}; loading {model}")
            with Engine(model, **config) as engine:
                engine.get_tokenizer()
                listener.engine_of = weakref.ref(engine)
                listener.state = "ready"
                key = "the key that you gave" if options.api_key else f"the secret in {listener.file}"
                _say(f"ready: {', '.join(listener.names)} at {where}/v1, with {key}; Ctrl-C ends it")
                signal.pause()


if __name__ == "__main__":
    sys.exit(main())
