"""Token ids to text as they arrive: whole characters only, stop strings wherever they fall."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

from nbengine.pieces import REPLACEMENT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbengine.pieces import Pieces
    from nbengine.tokenizer import Tokenizer


class Detokenizer:
    """The text of one sequence's output, growing. Owned by the engine's thread.

    `push` a token; `take_delta` gives the text that is new and final; `finish` lets go of what was held back (half a
    character, or what might have become a stop string). Joined deltas are `text`.

    >>> detokenizer = Detokenizer(tokenizer, prompt_ids, stop=["###"])  # doctest: +SKIP
    >>> for token_id in output_ids:                                     # doctest: +SKIP
    ...     if detokenizer.push(token_id): break
    ...     print(detokenizer.take_delta(), end="")
    """

    __slots__ = (
        "_before_end",
        "_context",
        "_decoder",
        "_fresh",
        "_given",
        "_held",
        "_include",
        "_min_tokens",
        "_pushed",
        "_stops",
        "stop_reason",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
    ) -> None:
        pieces = tokenizer.pieces(skip_special_tokens)
        if pieces is None:
            self._decoder: _PieceDecoder | _WindowDecoder = _WindowDecoder(tokenizer, prompt_ids, skip_special_tokens=skip_special_tokens)
        else:
            self._decoder = _PieceDecoder(pieces, prompt_ids)
        self._stops = tuple(dict.fromkeys(stop))
        self._before_end = frozenset(character for text in self._stops for character in text[:-1])
        self._include = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._pushed = 0
        self._given: list[str] = []  # text that take_delta has handed out
        self._fresh: list[str] = []  # text that it has not
        self._context = ""  # end of the decoded text, as long as an unfinished stop string can be
        self._held = 0  # characters at the end of the context that are not part of the text yet
        self.stop_reason: str | None = None

    def push(self, token_id: int) -> bool:
        """Add a token; True when a stop string is complete. What comes after that is not part of the text."""
        new = self._decoder.step(token_id)
        if self._stops:
            self._pushed += 1
            return self._add_checked(new)
        if new:
            self._fresh.append(new)
        return False

    @property
    def text(self) -> str:
        """Everything that is certain so far."""
        if len(self._given) > 1:
            self._given = ["".join(self._given)]
        return "".join(self._given + self._fresh)

    def take_delta(self) -> str:
        """The text since the last call."""
        if not self._fresh:
            return ""
        delta = "".join(self._fresh)
        self._fresh.clear()
        self._given.append(delta)
        return delta

    def finish(self) -> bool:
        """No more tokens come: release what was held back; True when that completed a stop string."""
        tail = self._decoder.flush()
        if not self._stops:
            self._fresh.append(tail)
            return False
        if not self._add_checked(tail) and self._held:
            self._fresh.append(self._context[-self._held :])
            self._held = 0
        return self.stop_reason is not None

    def _add_checked(self, new: str) -> bool:
        if self.stop_reason is not None or not new:
            return self.stop_reason is not None
        seen = len(self._context)
        text = self._context + new  # [0, seen - held): given away; [seen - held, seen): held; [seen, end): new
        start = seen - self._held
        # as in vLLM, the first min_tokens tokens are not looked at; a stop string may begin in them but not end there
        match = self._first_match(text, seen) if self._pushed > self._min_tokens else None
        if match is not None:
            begin, end, self.stop_reason = match
            self._fresh.append(text[start : end if self._include else begin])
            self._held = 0
            return True
        longest = self._unfinished(text)
        self._held = 0 if self._include else longest
        self._fresh.append(text[start : len(text) - self._held])
        self._context = text[len(text) - longest :]
        return False

    def _first_match(self, text: str, seen: int) -> tuple[int, int, str] | None:
        """The stop string that is complete first (the longest of those), ending in text[seen:]."""
        matches = []
        for stop in self._stops:
            begin = text.find(stop, max(0, seen - len(stop) + 1))
            if begin >= 0:
                matches.append((begin + len(stop), begin, stop))
        if not matches:
            return None
        end, begin, stop = min(matches)
        return begin, end, stop

    def _unfinished(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        if text[-1] not in self._before_end:
            return 0
        longest = 0
        for stop in self._stops:
            begin = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while 0 <= begin < len(text) - longest:
                if stop.startswith(text[begin:]):
                    longest = len(text) - begin
                    break
                begin = text.find(stop[0], begin + 1)
        return longest


class _PieceDecoder:
    """Joins pieces; keeps bytes back until they are characters."""

    __slots__ = ("_broken", "_bytes", "_first", "_pieces", "_shown")

    def __init__(self, pieces: Pieces, prompt_ids: Sequence[int]) -> None:
        self._pieces = pieces
        self._bytes = b""  # not yet a character
        self._broken = False  # this run of byte tokens is no UTF-8: every byte of it becomes U+FFFD
        self._first = True  # nothing stands before the next token
        unfinished: list[bytes] = []
        for piece in (pieces[token_id] for token_id in reversed(prompt_ids)):
            self._first = self._first and not piece
            if isinstance(piece, bytes):
                unfinished.insert(0, piece)
            elif piece:
                break
        for piece in unfinished:  # a prompt of ids may end within a character; the output then begins with that one
            self._join(piece)
        self._shown = self._flushed()  # how the prompt shows what it left unfinished

    def step(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if piece.__class__ is str and not (self._bytes or self._first or self._broken):
            return piece
        return self._slow(token_id, piece)

    def _slow(self, token_id: int, piece: str | bytes) -> str:
        if not piece:  # a hidden or unknown id: the decoder never sees it
            return ""
        if self._first:
            self._first = False
            piece = self._pieces.first(token_id)
        if isinstance(piece, bytes) or not self._pieces.byte_runs:
            return self._less_shown(self._join(piece.encode() if isinstance(piece, str) else piece))
        return self.flush() + piece

    def _join(self, new: bytes) -> str:
        data = self._bytes + new
        if not self._pieces.byte_runs:
            text, used = codecs.utf_8_decode(data, "replace", False)  # not final: half a character stays
            self._bytes = data[used:]
            return text
        self._bytes = b""
        try:
            return REPLACEMENT * len(data) if self._broken else data.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                self._bytes = data
                return ""
            self._broken = True
            return REPLACEMENT * len(data)

    def flush(self) -> str:
        text = self._flushed()
        self._bytes, self._broken = b"", False
        return self._less_shown(text)

    def _flushed(self) -> str:
        return REPLACEMENT * len(self._bytes) if self._pieces.byte_runs else self._bytes.decode("utf-8", "replace")

    def _less_shown(self, text: str) -> str:
        if not self._shown or not text:
            return text
        shown, self._shown = self._shown, ""
        return text.removeprefix(shown)


class _WindowDecoder:
    """For decoders that cannot be taken apart: decode the last few ids with and without the new one, and compare."""

    __slots__ = ("_decode", "_ids", "_known", "_skip")

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._decode = tokenizer.decode
        self._skip = skip_special_tokens
        hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._ids = [token_id for token_id in prompt_ids[-32:] if token_id not in hidden][
            -6:
        ]  # [0, known): text already given; [known:]: not yet a whole character
        self._known = len(self._ids)

    def step(self, token_id: int) -> str:
        self._ids.append(token_id)
        before, text = self._texts()
        if len(text) <= len(before) or text.endswith(REPLACEMENT):
            return ""
        del self._ids[: self._known]
        self._known = len(self._ids)
        return text[len(before) :]

    def flush(self) -> str:
        before, text = self._texts()
        self._known = len(self._ids)
        return text[len(before) :]

    def _texts(self) -> tuple[str, str]:
        ids = self._ids
        return self._decode(ids[: self._known], self._skip), self._decode(ids, self._skip)
