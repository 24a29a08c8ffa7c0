"""The options that `%engine serve` and `python -m nbengine.serve` share. A key is never typed: lines are seen and saved."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

KEY_VARIABLE = "NBENGINE_API_KEY"
NAMES = ("host", "port", "uds", "served_model_name", "max_queue", "max_body_size", "body_timeout", "stall_timeout")
ADVICE = f"a key on a command line is seen in process lists and saved in notebooks: put it into {KEY_VARIABLE}, or into a file for --api-key-file"


class _NoKeyHere(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.error(ADVICE)


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    """ServeOptions, by its own names."""
    add = parser.add_argument
    add("--host", metavar="ADDRESS", help="127.0.0.1; any that other machines can reach needs a key")
    add("--port", type=int, metavar="N", help="any that is free")
    add("--uds", metavar="PATH", help="a Unix socket in place of host and port")
    add("--api-key-file", metavar="FILE", help=f"holds the key that clients send; {KEY_VARIABLE} does as well")
    add("--api-key", nargs="?", action=_NoKeyHere, metavar="", help=argparse.SUPPRESS)
    add("--served-model-name", nargs="+", metavar="NAME", help="what clients call the model")
    add("--max-queue", type=int, metavar="N", help="outputs that may wait beyond those that run (1024)")
    add("--max-body-size", type=int, metavar="N", help="bytes of a request (8 MiB)")
    add("--body-timeout", type=float, metavar="S", help="seconds that a client may take to send its request (60)")
    add("--stall-timeout", type=float, metavar="S", help="seconds that a client may take nothing of what it is sent (120)")


def serve_values(given: argparse.Namespace) -> dict[str, Any]:
    """What was given of ServeOptions, the key from where it lies."""
    values = {name: value for name in NAMES if (value := getattr(given, name)) is not None}
    key = os.environ.get(KEY_VARIABLE)
    if given.api_key_file is not None:
        try:
            key = Path(given.api_key_file).expanduser().read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--api-key-file: {error}") from None
    return values if key is None else {**values, "api_key": key}
