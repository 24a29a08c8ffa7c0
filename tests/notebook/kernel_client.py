"""A real kernel, driven as a front end drives it."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

from jupyter_client.manager import KernelManager
from kernel_replies import WAIT, reply_to, value_of


@dataclass
class Ran:
    """What came back from one cell."""

    status: str = ""
    ename: str = ""
    evalue: str = ""
    out: str = ""  # what was printed
    err: str = ""
    shown: list[dict[str, Any]] = field(default_factory=list)  # displays, as they are in the end
    result: dict[str, Any] | None = None
    updates: int = 0
    seconds: float = 0.0
    widgets: list[str] = field(default_factory=list)  # comm ids that the cell opened
    display_ids: set[str] = field(default_factory=set)  # of its displays

    @property
    def text(self) -> str:
        """Everything a person reads, as plain text."""
        displays = [str(data.get("text/plain", "")) for data in self.shown]
        return "\n".join([self.out, *displays, str((self.result or {}).get("text/plain", ""))])


class Kernel:
    """One ipykernel process."""

    def __init__(self, env: dict[str, str] | None = None) -> None:
        self._folder = TemporaryDirectory(prefix="nbengine-")
        # sockets in a folder of its own: free ports that two test processes find at the same moment are the same ones
        self.id = str(uuid.uuid4())
        self.manager = KernelManager(
            kernel_name="python3", transport="ipc", ip=f"{self._folder.name}/kernel",
            connection_file=f"{self._folder.name}/kernel-{self.id}.json",  # named as a Jupyter server names it
        )  # fmt: skip
        self.manager.start_kernel(
            env={**os.environ, "PYDEVD_DISABLE_FILE_VALIDATION": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})},
            extra_arguments=["--log-level=CRITICAL"],
        )
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=WAIT)
        self.displays: dict[str, dict[str, Any]] = {}
        self._ran: dict[str, Ran] = {}  # what has come of each cell so far

    def start(self, code: str) -> str:
        """Send a cell and do not wait for it."""
        return self.client.execute(code, allow_stdin=False)

    def run(self, code: str, *, check: bool = True) -> Ran:
        """Run a cell to its end."""
        ran = self.finish(self.start(code))
        assert not check or ran.status == "ok", f"{ran.ename}: {ran.evalue}\n{ran.err}"
        return ran

    def finish(self, message: str, until: Callable[[dict[str, Any], Ran], bool] | None = None) -> Ran:
        """Read a cell's output to its end, or until a message is the one that is waited for."""
        ran, began = self._ran.setdefault(message, Ran()), time.monotonic()
        while True:
            msg = self.client.get_iopub_msg(timeout=WAIT)
            own = msg["parent_header"].get("msg_id") == message
            kind, content = msg["msg_type"], msg["content"]
            display_id = content.get("transient", {}).get("display_id") if isinstance(content, dict) else None
            if kind == "update_display_data":
                self.displays.setdefault(display_id, {}).clear()
                self.displays[display_id].update(content["data"])
                ran.updates += 1
            elif own:
                self._take(ran, kind, content, display_id)
            if until is not None and until(msg, ran):
                return ran
            if own and kind == "status" and content["execution_state"] == "idle":
                break
        ran.seconds = time.monotonic() - began
        reply = reply_to(self.client, message)
        ran.status = reply["status"]
        if ran.status == "error":
            ran.ename, ran.evalue = reply["ename"], reply["evalue"]
        return ran

    def _take(self, ran: Ran, kind: str, content: dict[str, Any], display_id: str | None) -> None:
        if kind == "stream":
            name = "out" if content["name"] == "stdout" else "err"
            setattr(ran, name, getattr(ran, name) + content["text"])
        elif kind == "display_data":
            data = dict(content["data"])
            if display_id is not None:
                self.displays[display_id] = data
                ran.display_ids.add(display_id)
            ran.shown.append(data)
        elif kind == "execute_result":
            ran.result = content["data"]
        elif kind == "comm_open":
            ran.widgets.append(content["comm_id"])

    def value(self, expression: str) -> Any:
        return value_of(self.client, expression)

    def inspect(self, code: str) -> str:
        """What a front end shows for `?`."""
        found = self.client.inspect(code, len(code), reply=True, timeout=WAIT)["content"]
        return str(found["data"].get("text/plain", ""))

    def interrupt(self) -> None:
        self.manager.interrupt_kernel()

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self._folder.cleanup()


@contextmanager
def with_tales() -> Iterator[Kernel]:
    """A kernel with the extension and tales loaded."""
    kernel = Kernel()
    try:
        kernel.run("%load_ext nbengine")
        kernel.run("%engine load tales --num-gpu-blocks-override 512")
        yield kernel
    finally:
        kernel.close()


# ── a long cell, and what is looked for while it runs ───────────────────────────────────────────────────────────────────

LONG = "-m 1500 --ignore-eos --no-chat --seed 1 --out g"
STATE = (
    "(g.finish_reason, len(g.token_ids) > 0, g.text == g.requests[0].outputs[0].text, e.stats()['blocks_used'], e.stats()['num_running'])"
)
STOPPED = ("abort", True, True, 0, 0)
QUICK = 0.5  # seconds from click to idle


def streaming(msg: dict[str, Any], ran: Ran) -> bool:
    """This cell's text has begun to come."""
    content = msg["content"]
    own = msg["msg_type"] == "update_display_data" and content["transient"]["display_id"] in ran.display_ids
    return own and len(str(content["data"].get("text/plain", ""))) > 5


def idle_after(message: str) -> Callable[[dict[str, Any], Ran], bool]:
    """The kernel has left this cell. An interrupt that meets ipykernel before the cell has begun ends it without a reply."""

    def left(msg: dict[str, Any], ran: Ran) -> bool:
        own = msg["parent_header"].get("msg_id") == message
        return own and msg["msg_type"] == "status" and msg["content"]["execution_state"] == "idle"

    return left


def stopped(kernel: Kernel, cell: str) -> tuple[Ran, float]:
    """Run a cell that prints a word and goes on, and press stop: what came of it, and the seconds from the press to idle."""
    message = kernel.start(cell)
    kernel.finish(message, lambda msg, ran: msg["msg_type"] == "stream")
    time.sleep(0.2)
    began = time.monotonic()
    kernel.interrupt()
    return kernel.finish(message), time.monotonic() - began


def send(kernel: Kernel, comm: str, content: dict[str, Any], header: dict[str, Any] | None = None) -> None:
    """A message to a widget, as its view sends it; the header may name a subshell."""
    data = {"method": "custom", "content": content}
    msg = kernel.client.session.msg("comm_msg", {"comm_id": comm, "data": data})
    msg["header"].update(header or {})
    kernel.client.shell_channel.send(msg)


def controls_opened(msg: dict[str, Any], ran: Ran) -> bool:
    return msg["msg_type"] == "comm_open" and "offers" in msg["content"]["data"].get("state", {})


def heard(msg: dict[str, Any], ran: Ran) -> bool:
    return msg["msg_type"] == "comm_msg" and bool(msg["content"]["data"].get("state", {}).get("heard"))
