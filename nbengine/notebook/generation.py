"""What the prompts of a cell became: live while they run, a plain value afterwards."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from nbengine.bell import Bell
from nbengine.errors import NBEngineError
from nbengine.notebook import render

if TYPE_CHECKING:
    from nbengine.engine import Engine
    from nbengine.notebook.token_view import TokenView
    from nbengine.outputs import FinishReason, Logprob, RequestMetrics, RequestOutput
    from nbengine.request import Request

LOOK = 0.1  # most seconds between two looks at whether it has ended
SHOWN = 1.0  # most seconds to wait for the end to be on the screen


class Generation:
    """The result of a `%%generate` or `%%chat` cell. It holds no tensors and does not keep its engine alive.

    `.text`, `.token_ids`, `.finish_reason` and `.logprobs` are those of the first output; `.requests` has them all.
    """

    def __init__(
        self, handles: Sequence[Request], engine: Engine, *, prompts: Sequence[str] = (), style: str = "text", show_tokens: bool = False
    ) -> None:
        self.handles = list(handles)
        self.prompts = list(prompts)  # as the cell had them, before any chat template
        self.style = style  # text, markdown or json
        self.show_tokens = show_tokens
        self.on_screen: int | None = None  # the number of the cell that shows it already
        self.background = False  # no cell waits for it
        self.stalled = False  # its engine was paused or asleep at some time, which its tokens a second would count
        self.view_finished: threading.Event | None = None  # set when what shows it has shown the end
        self._engine = weakref.ref(engine)
        self._outputs: list[RequestOutput] | None = None
        self._ended = 0  # so many of the first handles have

    # ── what it holds ───────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def requests(self) -> list[RequestOutput]:
        """One RequestOutput a prompt, with what there is so far."""
        if self._outputs is not None:
            return self._outputs
        done = self.done
        outputs = [handle.output() for handle in self.handles]
        if done:
            self._outputs = outputs
        return outputs

    @property
    def text(self) -> str:
        return self.handles[0].text

    @property
    def texts(self) -> list[str]:
        """The first output's text of every prompt."""
        return [handle.text for handle in self.handles]

    @property
    def token_ids(self) -> list[int]:
        return self.requests[0].outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """`stop`, `length`, `abort`, `error`; None while it runs."""
        return self.requests[0].outputs[0].finish_reason

    @property
    def logprobs(self) -> list[dict[int, Logprob]] | None:
        """One dict a token, where `--logprobs` asked for them: the chosen one first, then the most likely."""
        return self.requests[0].outputs[0].logprobs

    @property
    def metrics(self) -> RequestMetrics:
        """Counts and times of the first request."""
        return self.requests[0].metrics

    @property
    def tokens(self) -> TokenView:
        """The first output's tokens coloured by their probability; needs `--logprobs`."""
        from nbengine.notebook.token_view import TokenView

        return TokenView(self.requests[0].outputs[0])

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        ended, count = self._ended, len(self.handles)
        while ended < count and self.handles[ended].finished:
            ended += 1
        self._ended = ended
        return ended == count

    def on_end(self, ring: Callable[[], None]) -> None:
        """Have `ring` called in the engine's thread when it has ended. Whoever waits for that looks by itself too: it may have already."""

        def look() -> None:
            if self.done:
                ring()

        for handle in self.handles:
            handle.listen(look, at_end=True)

    @property
    def failure(self) -> str | None:
        """What a request failed with, in words."""
        try:
            self.raise_error()
        except NBEngineError as error:
            return str(error)
        return None

    @property
    def status(self) -> str:
        """`waiting`, `running`, `paused`, `asleep`, `finished`, `aborted` or `failed`."""
        states = {handle.status for handle in self.handles}
        order = ("paused", "asleep", "running", "waiting", "failed", "aborted", "finished")
        return next(state for state in order if state in states)

    @property
    def engine(self) -> Engine | None:
        """Where it runs or ran; None once that engine is gone."""
        return self._engine()

    # ── what can be done with it ────────────────────────────────────────────────────────────────────────────────────

    def cancel(self) -> None:
        """End its requests and no others; what they have stays, with finish_reason "abort". Harmless when it has ended."""
        for handle in self.handles:
            handle.cancel()

    def wait(self, timeout: float | None = None) -> Generation:
        """Wait until it has ended. An interrupt comes through and leaves it running; `cancel()` ends it.

        Raises TimeoutError after `timeout` seconds, and what a request failed with.
        """
        if not self.settle(timeout):
            raise TimeoutError(f"it is still {self.status}; it goes on, or call .cancel()")
        if self.view_finished is not None:
            self.view_finished.wait(SHOWN)
        self.raise_error()
        return self

    def settle(self, timeout: float | None = None) -> bool:
        """Wait until it has ended, however it does; False if `timeout` seconds were not enough."""
        deadline = None if timeout is None else monotonic() + timeout
        bell = Bell()
        self.on_end(bell.ring)
        while not self.done:
            if deadline is not None and monotonic() > deadline:
                return False
            bell.wait(LOOK)
        return True

    def raise_error(self) -> None:
        """Raise what a request failed with, if any has."""
        for handle in self.handles:
            handle.raise_error()

    # ── what it turns into ──────────────────────────────────────────────────────────────────────────────────────────

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {"requests": [render.request_dict(output) for output in self.requests]}

    def to_frame(self) -> Any:
        """A pandas DataFrame with one row for each output of each prompt."""
        try:
            import pandas as pd
        except ImportError:
            raise ImportError("to_frame() needs pandas: pip install pandas, or use to_dict()") from None
        return pd.DataFrame(render.rows(self))

    def __len__(self) -> int:
        return len(self.handles)

    def __str__(self) -> str:
        return self.text if len(self) == 1 else "\n\n".join(self.texts)

    def __repr__(self) -> str:
        tokens = sum(len(completion.token_ids) for handle in self.handles for completion in handle.completions)
        return f"<Generation {self.status}: {len(self)} prompt{'s' * (len(self) != 1)}, {tokens} tokens>"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:  # noqa: ARG002 - the protocol's
        return render.whole(self)

    def _ipython_display_(self) -> None:
        """Show it, unless the cell that made it has shown it already."""
        from IPython.core.getipython import get_ipython
        from IPython.display import display

        shell: Any = get_ipython()
        if self.on_screen is not None and shell is not None and self.on_screen == shell.execution_count:
            return
        display(self._repr_mimebundle_(), raw=True)
