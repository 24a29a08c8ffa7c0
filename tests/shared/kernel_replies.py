"""What a Jupyter kernel answers on its shell channel."""

from __future__ import annotations

import ast
import queue
import time
from typing import Any

from jupyter_client import BlockingKernelClient

WAIT = 120.0


def reply_to(client: BlockingKernelClient, message: str) -> dict[str, Any]:
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        try:
            reply = client.get_shell_msg(timeout=1)
        except queue.Empty:
            continue
        if reply["parent_header"].get("msg_id") == message:
            return reply["content"]
    raise TimeoutError(message)


def value_of(client: BlockingKernelClient, expression: str) -> Any:
    """What an expression is in the kernel, as plain Python."""
    message = client.execute("", silent=True, user_expressions={"value": f"repr({expression})"})
    reply = reply_to(client, message)["user_expressions"]["value"]
    assert reply["status"] == "ok", reply
    return ast.literal_eval(ast.literal_eval(reply["data"]["text/plain"]))
