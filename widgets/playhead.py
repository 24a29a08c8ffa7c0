"""The moment that all views of a trace show together: live, or a recorded step; and what moves it."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from nbengine.errors import NBEngineError, nearest
from nbengine.front import Front, Ticker
from nbengine.trace import Trace
from nbengine.trace_columns import origin

if TYPE_CHECKING:
    from nbengine.bell import Reply
    from nbengine.engine import Engine
    from nbengine.trace import StepRecord

FASTEST = 0.1  # seconds between two updates, at the least
SHARE = 100  # and no more than a hundredth of the time goes into them, all views of an engine together
USUAL = 10.0  # recorded steps a second, where nobody has chosen a speed
SLOWEST, MOST = 0.2, 60.0  # steps a second that can be chosen
LAST = 1.0  # seconds that the end of an engine waits for who has the lock

M = TypeVar("M")


class Looker(Protocol):
    """A view, as a playhead sees it."""

    @property
    def looked_at(self) -> bool:
        """Whether anybody sees it now."""

    def refresh(self) -> None:
        """Send the whole state of this moment, if it has changed. Called by one thread at a time, the front's or one that acts."""

    def settled(self) -> None:
        """Nothing has changed for a while, or nothing will: keep what is to stay. Called as `refresh` is."""

    def complain(self, error: BaseException) -> None:
        """Show an error that nobody else would see."""


class Playhead:
    """One for each trace; `Playhead.of` gives it. It knows its engine by a weak reference only.

    Any thread may move it. It lets its views look again, in the engine's front thread while there is one, at most ten times a second.
    """

    def __init__(self, trace: Trace, engine: Engine | None) -> None:
        self.trace = trace
        self.lock = threading.RLock()  # held while views look, and while one is moved
        self.speed: float | None = None  # steps a second; None: as fast as the engine can, or USUAL for recorded ones
        self._engine = None if engine is None else weakref.ref(engine)
        self._at: int | None = None  # None: live
        self._moves: Ticker | None = None  # moves by itself: the engine step by step, or through the record
        self._ticker: Ticker | None = None
        self._own: Front | None = None  # where there is no engine's
        self._views: weakref.WeakSet[Looker] = weakref.WeakSet()
        self._models: dict[Any, Any] = {}
        self._origin: float | None = None
        self._replies: deque[Reply[Any]] = deque()
        self._changed: tuple[float, tuple[Any, ...], bool] = (
            0.0,
            (),
            True,
        )  # when what was last seen, and whether the views were told that it stays
        self._took: deque[float] = deque([0.0] * 3, maxlen=3)  # by the last looks of the ticker, in seconds of its thread's time
        if engine is not None:
            engine.front.at_end(self._end)

    @classmethod
    def of(cls, source: Engine | Trace | Any) -> Playhead:
        """That of an engine (or an LLM, which has one) or of a trace."""
        engine: Any = getattr(source, "engine", source)
        trace = source if isinstance(source, Trace) else getattr(engine, "trace", None)
        if not isinstance(trace, Trace):
            raise TypeError(
                f"a view shows an Engine or a Trace, not {type(source).__name__}: pass engine, engine.trace or Trace.load(path)"
            )
        if trace.playhead is None:
            trace.playhead = cls(trace, None if source is trace else engine)
        elif trace.playhead._engine is None and source is not trace:  # noqa: SLF001 - its trace alone was shown before
            trace.playhead._engine = weakref.ref(engine)  # noqa: SLF001
            engine.front.at_end(trace.playhead._end)  # noqa: SLF001
        return trace.playhead

    # ── the moment ──────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def engine(self) -> Engine | None:
        """The engine, as long as it lives and is open."""
        engine = None if self._engine is None else self._engine()
        return None if engine is None or engine.status in {"closed", "dead"} else engine

    @property
    def status(self) -> str:
        """The engine's, `running slowly` when it is stepped by this, or `recorded` where there is none."""
        if self._engine is None:
            return "recorded"
        engine = self._engine()
        status = "closed" if engine is None else engine.status
        return "running slowly" if self._moves is not None and self.live and status == "paused" else status

    @property
    def traced(self) -> bool:
        """Whether there is a record to show, or can be one."""
        return self.trace.capacity > 0 or len(self.trace) > 0

    @property
    def live(self) -> bool:
        """Whether it stays with the newest record."""
        return self._at is None

    @property
    def playing(self) -> bool:
        """Whether it moves through the record by itself."""
        return self._moves is not None and not self.live

    @property
    def number(self) -> int:
        """The number of the record that is shown; -1 if there is none yet."""
        end = self.trace.end
        if self._at is None:
            return end - 1
        return min(max(self._at, self.trace.first), end - 1)

    @property
    def record(self) -> StepRecord | None:
        """The record that is shown."""
        try:
            return self.trace.record(self.number)
        except LookupError:
            return self.trace.last

    @property
    def origin(self) -> float | None:
        """The time, on the trace's clock, from which all views count: as it was found first; None while there is no record."""
        if self._origin is None and (first := next(iter(self.trace), None)) is not None:
            self._origin = origin(self.trace, first)
        return self._origin

    def model(self, kind: Callable[[Trace], M]) -> M:
        """What several views derive from this trace, kept and shared by them: made by `kind(trace)` at first."""
        if kind not in self._models:
            self._models[kind] = kind(self.trace)
        return self._models[kind]

    def describe(self) -> dict[str, Any]:
        """All that the controls show of it."""
        record, engine = self.record, self.engine
        return {
            "first": self.trace.first,
            "last": self.trace.end - 1,
            "at": self.number,
            "live": self.live,
            "traced": self.traced,
            "playing": self.playing,
            "status": self.status,
            "engine": engine is not None,
            "speed": self.speed,
            "step": None if record is None else record.step,
            "seconds": 0.0 if record is None or self.origin is None else round(record.time - self.origin, 4),
            "name": self.trace.name,
        }

    # ── moving it ───────────────────────────────────────────────────────────────────────────────────────────────────

    def seek(self, number: int) -> None:
        """Show the record of this number (of `trace.record`); the nearest one that there is."""
        with self.lock:
            if self.trace.end == 0:
                return
            self._hold()
            self._at = min(max(int(number), self.trace.first), self.trace.end - 1)
        self.look()

    def seek_time(self, seconds: float) -> None:
        """Show the last record that began at or before this time on the trace's clock."""
        records = self.trace.since(self.trace.first)
        before = sum(1 for record in records if record.time <= seconds)
        self.seek(self.trace.end - len(records) + max(0, before - 1))

    def go_live(self) -> None:
        """Stay with the newest record again."""
        with self.lock:
            if not self.live:
                self._hold()
            self._at = None
        self.look()

    def pause(self) -> None:
        """Stop the engine between two steps; in the past, stop moving through the record."""
        with self.lock:
            self._hold()
            if self.live:
                self._ask("pause")
        self.look()

    def resume(self) -> None:
        """Go on: the engine at its speed, or through the record until its end."""
        with self.lock:
            self._hold()
            if not self.live:
                self._move(self._forward, self.speed or USUAL)
            elif self.engine is None and self.trace.end:
                self._at = self.trace.first
                self._move(self._forward, self.speed or USUAL)
            elif self.speed is None:
                self._ask("resume")
            else:
                self._ask("pause")
                self._move(lambda: self._ask("step"), self.speed)
        self.look()

    def step(self, count: int = 1) -> None:
        """Move by one step, or by several: the paused engine, or the record that is shown, which may also go back (-1)."""
        with self.lock:
            self._hold()
            engine = self.engine
            if self.live and count > 0 and engine is not None:
                if engine.status != "paused":
                    self._ask("pause")
                for _ in range(count):
                    self._ask("step")
            elif self.trace.end:
                self._at = min(max(self.number + count, self.trace.first), self.trace.end - 1)
        self.look()

    def set_speed(self, speed: float | None) -> None:
        """Steps a second, or None for full speed; a running engine is slowed down or let go at once."""
        if speed is not None and not SLOWEST <= float(speed) <= MOST:
            raise ValueError(f"speed must be between {SLOWEST} and {MOST:g} steps a second, or None for full speed, not {speed!r}")
        with self.lock:
            moving, engine = self._moves is not None, self.engine
            self.speed = None if speed is None else float(speed)
            if moving or (self.live and engine is not None and engine.status in {"running", "idle"}):
                self.resume()
        self.look()

    def act(self, name: str, value: Any = None) -> None:
        """Do what a button asks for, by its name."""
        actions: dict[str, Callable[[], None]] = {
            "pause": self.pause,
            "resume": self.resume,
            "step": self.step,
            "back": lambda: self.step(-1),
            "live": self.go_live,
            "seek": lambda: self.seek(value),
            "speed": lambda: self.set_speed(value),
        }
        if name not in actions:
            raise ValueError(f"no control is called {name!r}{nearest(name, actions)}")
        actions[name]()

    def _hold(self) -> None:
        """Move no more by itself."""
        if self._moves is not None:
            self._moves.stop()
            self._moves = None

    def _move(self, function: Callable[[], None], speed: float) -> None:
        if self.engine is None and self._own is None:
            self._own = Front("nbengine-playhead")
            weakref.finalize(self, self._own.close)
        self._moves = self._front().every(1 / speed, function)

    def _forward(self) -> None:
        """One recorded step on; at the end of the record, live again."""
        with self.lock:
            if self._at is None:
                return
            self._at = max(self._at + 1, self.trace.first)
            if self._at >= self.trace.end - 1:
                self._at = None if self.engine is not None else self.trace.end - 1
                if self._moves is not None:
                    self._moves.stop()
                    self._moves = None
        if self._own is not None:
            self._look()

    def _ask(self, name: str) -> None:
        """Have the engine do something, without waiting for it; what goes wrong is shown at the next look."""
        engine = self.engine
        if engine is None:
            raise NBEngineError("this trace has no engine, or that was closed: it can be moved through and not be run on")
        self._replies.append(engine._mailbox.call(name))  # noqa: SLF001 - its own methods wait

    # ── its views ───────────────────────────────────────────────────────────────────────────────────────────────────

    def add(self, view: Looker) -> None:
        """Let a view follow."""
        self._views.add(view)

    def remove(self, view: Looker) -> None:
        """Let a view go; with the last one, an engine that it slowed down runs on by itself."""
        self._views.discard(view)
        if self._views:
            return
        with self.lock:
            slowed = self._moves is not None and self.live
            self._hold()
            if slowed and self.engine is not None:
                self._ask("resume")
            own, self._own = self._own, None
        if own is not None:
            own.close()

    def look(self) -> None:
        """Have the views look soon, and go on looking while anybody sees them. From any thread."""
        try:
            front = self._front()
            front.call(self._look)
            with self.lock:
                if (self._ticker is None or self._ticker.stopped) and self._engine is not None:
                    self._ticker = front.every(FASTEST, self._tick)
        except NBEngineError:  # there is no thread to do it: the engine is closed, or there is none
            self._look()

    def _front(self) -> Front:
        engine = self.engine
        if engine is not None:
            return engine.front
        if self._own is None:
            raise NBEngineError("no thread moves this")
        return self._own

    def _tick(self) -> None:
        ticker = self._ticker
        if not any(view.looked_at for view in list(self._views)):
            if ticker is not None:
                ticker.stop()
            return
        began = time.thread_time()
        self._look()
        self._took.append(time.thread_time() - began)
        if ticker is not None:  # a look that is costly once, as a view's first is, does not hold up the next ones
            ticker.seconds = max(FASTEST, SHARE * median(self._took))

    def _look(self) -> None:
        with self.lock:
            views = list(self._views)
            self._tell_of_failures(views)
            for view in views:
                if view.looked_at:
                    _guarded(view, view.refresh)
            seen, now = (self.trace.end, self.number, self.live, self.status), time.monotonic()
            if seen != self._changed[1]:
                self._changed = now, seen, False
            elif not self._changed[2] and now - self._changed[0] > SETTLED:
                self._changed = (*self._changed[:2], True)
                for view in views:
                    _guarded(view, view.settled)

    def _end(self) -> None:
        """The engine's front ends, and with it what this moves by: a last look, and last pictures whether anybody looks or not."""
        if not self.lock.acquire(timeout=LAST):  # whoever has it may be waiting for this: an engine is let go wherever garbage is found
            return
        try:
            self._hold()
            self._look()
            for view in list(self._views):
                _guarded(view, view.settled)
        finally:
            self.lock.release()

    def _tell_of_failures(self, views: list[Looker]) -> None:
        while self._replies and self._replies[0].answered:
            try:
                self._replies.popleft().result()
            except Exception as error:  # noqa: BLE001 - shown under the views: a button has no cell to raise in
                for view in views:
                    view.complain(error)


SETTLED = 1.0  # seconds without a change


def _guarded(view: Looker, look: Callable[[], None]) -> None:
    try:
        look()
    except Exception as error:  # noqa: BLE001 - shown under the view
        view.complain(error)
