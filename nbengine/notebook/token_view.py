"""A text token by token, coloured by probability: static HTML without script or style sheet, so that it survives saving."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

from nbengine.outputs import CompletionOutput, Logprob

SHOWN = 2000  # tokens
ALTERNATIVES = 6  # in a tooltip
LONGEST = 24  # characters of a token in a tooltip
LISTED = 40  # up to so many tokens, plain text is a list of them
HALF = "\ufffd"  # what a part of a character decodes to
MOST_BITS, MOST_ALPHA = 8.0, 0.5  # from 1 in 256 on the colour is full; text stays readable on it, on white and on black
VISIBLE = {**{code: chr(0x2400 + code) for code in range(32)}, 127: "\u2421", 32: "\u2423", 10: "\u23ce", 9: "\u21e5"}
CONTROLS = {code: sign for code, sign in VISIBLE.items() if code not in {9, 10, 32}}
QUIET = "opacity:.7;font-size:85%"


@dataclass(slots=True)
class Piece:
    """What is shown as one: a token, or the tokens that only together make a character."""

    text: str
    tokens: list[dict[int, Logprob]]  # as in CompletionOutput.logprobs

    @property
    def probability(self) -> float:
        """Of the least likely of its tokens."""
        return min(math.exp(_chosen(token)[1].logprob) for token in self.tokens)


class TokenView:
    """The tokens of an output, each on a background that grows stronger the less likely it was; hover one for its alternatives.

    >>> TokenView(result.requests[0].outputs[0])  # doctest: +SKIP
    """

    def __init__(self, output: CompletionOutput) -> None:
        if output.logprobs is None:
            raise ValueError("this output has no probabilities: run with --logprobs (in Python: SamplingParams(logprobs=5))")
        self.text = output.text
        self.total = len(output.logprobs)
        self._tokens = output.logprobs[:SHOWN]

    def __repr__(self) -> str:
        if self.total > LISTED:
            return self.text
        return "\n".join(f"{_percent(piece.probability):>8}  {_visible(piece.text)}" for piece in self._pieces())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:  # noqa: ARG002 - IPython's protocol
        return {"text/plain": repr(self), "text/html": self._repr_html_()}

    def _repr_html_(self) -> str:
        # <pre> keeps the lines where styles are stripped, and no front end looks for formulas in it
        spans = "".join(_span(piece) for piece in self._pieces())
        style = "white-space:pre-wrap;overflow-wrap:break-word;word-break:normal;line-height:1.7;margin:0 0 8px;font-family:inherit"
        cut = f"the first {SHOWN:,} of {self.total:,} tokens are shown; " if self.total > SHOWN else ""
        return f'<pre style="{style}">{spans}</pre><div style="{QUIET}">{cut}{LEGEND}</div>'

    def _pieces(self) -> Iterator[Piece]:
        """The tokens beside the text that they make. A token alone may decode to less than that: half a character, or no leading space."""
        position, parts = 0, []  # tokens that wait for the rest of their character
        for token in self._tokens:
            text = _text(token)
            if HALF in text:
                parts.append(token)
                continue
            if parts:
                end = self.text.find(text, position + 1, position + 8 * len(parts) + len(text)) if text else -1
                yield Piece(self.text[position:end] if end > 0 else "".join(map(_text, parts)), parts)
                position, parts = max(position, end), []
            if not self.text.startswith(text, position) and self.text.startswith(f" {text}", position):
                text = f" {text}"
            if self.text.startswith(text, position):  # not the end token, which is no part of the text
                position += len(text)
            yield Piece(text, [token])
        if parts:
            rest = self.text[position:] if self.total <= SHOWN else ""
            yield Piece(rest or "".join(map(_text, parts)), parts)


def _chosen(token: dict[int, Logprob]) -> tuple[int, Logprob]:
    return next(iter(token.items()))


def _text(token: dict[int, Logprob]) -> str:
    return _name(*_chosen(token))


def _name(token_id: int, logprob: Logprob) -> str:
    return f"#{token_id} " if logprob.decoded_token is None else logprob.decoded_token


def _span(piece: Piece) -> str:
    shown = escape(piece.text.translate(CONTROLS)).replace("\n", "\u23ce\n")
    return f'<span title="{_tooltip(piece)}" style="{_style(piece.probability)}">{shown}</span>'


def _style(probability: float) -> str:
    bits = -math.log2(probability) if probability > 0 else MOST_BITS
    alpha = MOST_ALPHA * min(1.0, max(0.0, bits) / MOST_BITS)
    line = "2px solid" if probability < 0.01 else "1px dashed" if probability < 0.1 else ""  # colour is not the only sign
    return f"background-color:rgba(213,94,0,{alpha:.2f})" + (f";border-bottom:{line} #d55e00" if line else "")


def _tooltip(piece: Piece) -> str:
    heads = [f"{len(piece.tokens)} tokens make this character"] if len(piece.tokens) > 1 else []
    lines = [line for token in piece.tokens for line in _tooltip_lines(token)]
    return escape("\n".join([*heads, *lines])).replace("\n", "&#10;")


def _tooltip_lines(token: dict[int, Logprob]) -> Iterator[str]:
    (token_id, chosen), *others = token.items()
    rank = "" if chosen.rank is None else f"  rank {chosen.rank}"
    yield f"{_quoted(token_id, chosen)}  {_percent(math.exp(chosen.logprob))}{rank}"
    for other_id, other in others[:ALTERNATIVES]:
        yield f"   {_percent(math.exp(other.logprob)):>7}  {_quoted(other_id, other)}"
    if len(others) > ALTERNATIVES:
        yield f"   and {len(others) - ALTERNATIVES} more"


def _quoted(token_id: int, logprob: Logprob) -> str:
    text = _name(token_id, logprob)
    if HALF in text:
        return f"part of a character (#{token_id})"
    return _visible(text if len(text) <= LONGEST else text[: LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}") or f"nothing (#{token_id})"


def _visible(text: str) -> str:
    """With a sign for each space, line end and control character."""
    return text.translate(VISIBLE)


def _percent(probability: float) -> str:
    return f"{100 * probability:.3g} %" if probability >= 0.0001 else "< 0.01 %"


LEGEND = "probability: " + " ".join(f'<span style="{_style(p)}">&nbsp;{_percent(p)}&nbsp;</span>' for p in (1.0, 0.5, 0.1, 0.05, 0.005))
LEGEND += " (hover a token for its rank and the alternatives)"
