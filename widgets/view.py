"""What every live view has in common: when it sends, what it hears, and the static picture that stays."""

from __future__ import annotations

import json
import logging
import re
import time
import weakref
from collections import deque
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import traitlets
from IPython.core.getipython import get_ipython
from IPython.display import display

from nbengine.widgets.playhead import SHARE, Playhead
from nbengine.widgets.still import Still

log = logging.getLogger("nbengine")
HERE = Path(__file__).parent
IMPORT = re.compile(r'^import \{[^}]*\} from "\./(\w+\.js)";\n', re.MULTILINE)
PATIENCE = 20.0  # seconds that a front end which was sent something may take to say that it has drawn it
CHEAP = 0.005  # seconds that a picture may take at the end of every cell; one that takes longer gets no more than its share of the time

UNTRACED = "This engine keeps no trace (trace_steps=0): make it without that to see what it does."
EMPTY = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 656 32" width="656" role="img" style="max-width:100%" font-family="sans-serif" '
    f'font-size="11" fill="#333333"><title>{UNTRACED}</title><rect width="100%" height="100%" fill="#ffffff"/>'
    f'<text x="8" y="20">{UNTRACED}</text></svg>'
)


@cache
def module(name: str) -> str:
    """A view's script with those it imports in front of it, each once: a front end loads one text and has no place to import from."""
    parts: dict[str, str] = {}
    _collect(name, parts)
    own = parts.pop(name)
    return "".join(re.sub(r"^export (?=const|function|class)", "", other, flags=re.MULTILINE) for other in parts.values()) + own


def _collect(name: str, parts: dict[str, str]) -> None:
    """A script without its imports, after the scripts that it imports."""
    text = (HERE / name).read_text("utf-8")
    for other in IMPORT.findall(text):
        if other not in parts:
            _collect(other, parts)
    parts[name] = IMPORT.sub("", text)


@cache
def style(name: str) -> str:
    """A view's style sheet, after that of the frame."""
    return (HERE / "frame.css").read_text("utf-8") + (HERE / name).read_text("utf-8")


class View(Still):
    """A live view of an engine or a trace. Subclasses say what it shows: `state`, `picture`, `summary`, and `act` on what is pressed.

    It is sent whole, in one message, when it has changed and somebody sees it. It keeps no engine alive and holds no tensors.
    """

    title = ""
    packed = traitlets.Dict().tag(sync=True)  # the frame: its JSON as one text, which is sent much faster than what is in it, and its bytes

    def __init__(self, source: Any) -> None:
        playhead = Playhead.of(source)
        super().__init__()
        self.playhead = playhead
        self.frame: dict[str, Any] = {}  # all that is drawn, as it was last sent
        self.updates = 0  # how often it was sent
        self._trouble = ""
        self._note = ""  # what there is to say beside it
        self._stamp: tuple[Any, ...] | None = None  # of what was last refreshed
        self._eyes: dict[str, bool] = {}  # by each place where it is drawn: whether that can be seen
        self._heard: dict[str, int] = {}  # by each place: the number of its last press that was acted on
        self._unseen_since: float | None = None  # when the first update was sent that no place has drawn yet
        self._cells = _RunningCell(self._cell_ended)
        self._picture: Any = None  # the display of the static picture
        self._pictured = ""
        self._picture_stamp: tuple[Any, ...] | None = None  # of what it shows
        self._picture_time = 0.0  # when it was last renewed
        self._took: deque[float] = deque([0.0] * 3, maxlen=3)  # by the last pictures, in seconds of their thread's time
        self._left = False  # by all places where it was drawn: nobody has its picture any more
        self.on_msg(self._hear)
        self.playhead.add(self)

    # ── for subclasses ──────────────────────────────────────────────────────────────────────────────────────────────

    def stamp(self) -> tuple[Any, ...]:
        """Equal to the last one exactly if there is nothing new to show; cheap."""
        playhead = self.playhead
        return playhead.trace.end, playhead.trace.first, playhead.number, playhead.live, playhead.status, playhead.speed, playhead.playing

    def state(self) -> dict[str, Any]:
        """All that it draws at the playhead's moment: JSON values, and bytes."""
        raise NotImplementedError

    def picture(self) -> str:
        """The same as an SVG that needs no script."""
        raise NotImplementedError

    def summary(self) -> str:
        """The same in a line of text."""
        raise NotImplementedError

    def act(self, name: str, value: Any) -> None:
        """Do what somebody pressed."""
        self.playhead.act(name, value)

    # ── showing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def looked_at(self) -> bool:
        """Whether anybody sees it: it is drawn somewhere in sight, and what was sent was drawn (or a cell keeps the kernel from hearing so)."""
        if not any(self._eyes.values()):
            return False
        waited = 0.0 if self._unseen_since is None else time.monotonic() - max(self._unseen_since, self._cells.ended)
        return waited < PATIENCE or self._cells.running

    def refresh(self) -> None:
        heard = dict(self._heard)
        stamp = (*self.stamp(), self._trouble, heard)
        if stamp == self._stamp:
            return
        note = self._note or ("" if self.playhead.traced else UNTRACED)
        frame = {"moment": self.playhead.describe(), "trouble": self._trouble, "note": note, "heard": heard, **self.state()}
        self._stamp = stamp
        if frame == self.frame:
            return
        self._show(frame)

    def settled(self) -> None:
        """Bring the static picture up to date, if there is anything new to show. Called under the playhead's lock."""
        if self._picture is None or self._left:
            return
        stamp = self.stamp()
        if stamp == self._picture_stamp:
            return
        self._picture_stamp = stamp
        bundle = self._still()
        self._picture_time = time.monotonic()
        if bundle["image/svg+xml"] != self._pictured:
            self._pictured = bundle["image/svg+xml"]
            self._picture.update(bundle, raw=True)

    def _cell_ended(self) -> None:
        """A notebook may be saved as it is now, whether anybody looks or not: so its picture is of now, unless it costs too much."""
        cost = median(self._took)
        if cost > CHEAP and time.monotonic() - self._picture_time < SHARE * cost:
            return
        with self.playhead.lock:
            try:
                self.settled()
            except Exception as error:  # noqa: BLE001 - shown under the view: the cell that has ended has nothing to do with it
                self.complain(error)

    def complain(self, error: BaseException) -> None:
        """Show an error under the view."""
        log.error("a view met an error", exc_info=error)
        self._trouble = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if self._trouble != self.frame.get("trouble"):
            self._show({**self.frame, "moment": self.playhead.describe(), "trouble": self._trouble})
        self._stamp = None  # what is shown is no refresh's, and the next one may have to take it away again

    def _show(self, frame: dict[str, Any]) -> None:
        values = {name: value for name, value in frame.items() if name != "data"}
        text = json.dumps(values, separators=(",", ":"), allow_nan=False)
        self.frame = frame
        self.updates += 1
        if self._unseen_since is None:
            self._unseen_since = time.monotonic()
        self.packed = {"json": text, "data": frame.get("data", b"")}

    def snapshot(self) -> Any:
        """What it shows now, as a picture (IPython's SVG) that needs neither a kernel nor a script."""
        from IPython.display import SVG

        with self.playhead.lock:
            return SVG(data=self._svg())

    def close(self) -> None:
        """Send no more, and leave the static picture."""
        if self.comm is not None:
            self.playhead.remove(self)
            with self.playhead.lock:
                self.settled()
            self._eyes.clear()
            self._cells.forget()
            super().close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.summary() if self.playhead.traced else UNTRACED}>"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None, **kwargs: Any) -> Any:  # noqa: ARG002 - IPython's protocol
        made = super()._repr_mimebundle_(**kwargs)
        bundle: dict[str, Any] = dict(made[0] if isinstance(made, tuple) else made or {})
        return {**bundle, **self._still()}

    def _ipython_display_(self) -> None:
        """The live view and, hidden where that shows, a picture of it that can be brought up to date without drawing it anew."""
        if getattr(get_ipython(), "kernel", None) is None:
            print(repr(self))  # noqa: T201 - a terminal has nothing else to show it on
            return
        if self.comm is None:  # it was closed: only the picture is left of it
            display(self._still(), raw=True)
            return
        with self.playhead.lock:
            self._picture_stamp, self._left = self.stamp(), False
            bundle = self._repr_mimebundle_()
        self._pictured = bundle.pop("image/svg+xml")
        display(bundle, raw=True)
        still = {"text/plain": "", "image/svg+xml": self._pictured}
        self._picture = display(still, raw=True, display_id=self.still)  # the same of all its displays, which so stay alike

    def _still(self) -> dict[str, str]:
        with self.playhead.lock:
            began = time.thread_time()
            bundle = {"text/plain": repr(self), "image/svg+xml": self.named(self._svg())}
            self._took.append(time.thread_time() - began)
            return bundle

    def _svg(self) -> str:
        return self.picture() if self.playhead.traced else EMPTY

    # ── hearing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _hear(self, _: Any, message: dict[str, Any], __: Any) -> None:
        """From a place where it is drawn: that it can be seen, that it has drawn what was sent, or what was pressed."""
        place = str(message.get("place"))
        self._unseen_since = None
        if "seen" in message:
            self._eyes[place] = bool(message["seen"])
        if message.get("gone"):
            self._eyes.pop(place, None)
            self._heard.pop(place, None)
        self._left = bool(message.get("gone")) and not self._eyes
        if "press" in message:
            self._trouble = ""
            try:
                self.act(str(message["press"]), message.get("value"))
            except Exception as error:  # noqa: BLE001 - shown under the view: a callback has no cell to raise in
                self.complain(error)
        if "number" in message:
            self._heard[place] = message["number"]
            self.send({"heard": message["number"], "place": place})
        if self.looked_at:
            self.playhead.look()


class _RunningCell:
    """Whether a cell runs, which may keep the kernel from hearing what a view's places say; calls a method when one has ended."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = weakref.WeakMethod(then)  # the shell, which calls this, keeps no view alive
        self.running = False
        self.ended = time.monotonic()
        self._shell = get_ipython()
        if self._shell is not None:
            self.running = True  # it is made in one
            self._shell.events.register("pre_run_cell", self._begin)
            self._shell.events.register("post_run_cell", self._end)

    def forget(self) -> None:
        if self._shell is not None:
            self._shell.events.unregister("pre_run_cell", self._begin)
            self._shell.events.unregister("post_run_cell", self._end)
            self._shell = None

    def _begin(self, _: Any = None) -> None:
        self.running = True

    def _end(self, _: Any = None) -> None:
        self.running, self.ended = False, time.monotonic()
        then = self._then()
        if then is not None:
            then()
