"""What each token id adds to a text, for tokenizers whose decoder joins tokens end to end (nearly all of today's)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

    from nbengine.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Pieces(dict[int, "str | bytes"]):
    """id -> its text, or its bytes when they need neighbours to be characters; filled as ids are seen.

    A piece is what the id adds in the middle of a text. The first id of a text may add less (a leading space is
    dropped): `first` tells. Lookups of a known id are plain dict reads: a step asks for hundreds.
    """

    def __init__(self, backend: tokenizers.Tokenizer, hidden: frozenset[int], byte_of: dict[str, int], anchor: int, *, runs: bool) -> None:
        super().__init__()
        self.backend = backend
        self.hidden = hidden  # ids that are left out of the text
        self.byte_runs = runs  # byte tokens <0xE4>: a run of them is characters, or else one U+FFFD a byte
        self._byte_of = byte_of
        self._anchor = anchor
        self._anchor_text = backend.decode([anchor], skip_special_tokens=False)

    @classmethod
    def of(cls, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> Pieces | None:
        backend = tokenizer.backend
        if backend is None or backend.decoder is None:
            return None
        kind = _kind(json.loads(backend.decoder.__getstate__()))
        anchor = _anchor(backend, tokenizer.special_ids)
        if kind is None or anchor is None:
            return None
        byte_of = _byte_level_alphabet() if kind == "bytes" else {f"<0x{value:02X}>": value for value in range(256)}
        hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        return cls(backend, hidden, byte_of, anchor, runs=kind == "runs")

    def __missing__(self, token_id: int) -> str | bytes:
        piece = self[token_id] = self._piece(token_id)
        return piece

    def _piece(self, token_id: int) -> str | bytes:
        token = self.backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None or token_id in self.hidden:
            return ""
        if self.byte_runs:
            if token in self._byte_of:
                return bytes((self._byte_of[token],))
        else:
            raw = self._raw_bytes(token)
            if REPLACEMENT in raw.decode("utf-8", "replace"):
                return raw
        return self.backend.decode([self._anchor, token_id], skip_special_tokens=False)[len(self._anchor_text) :]

    def _raw_bytes(self, token: str) -> bytes:
        try:
            return bytes(map(self._byte_of.__getitem__, token))
        except KeyError:  # an added token that is not written in the byte alphabet stands for itself
            return token.encode()

    def first(self, token_id: int) -> str | bytes:
        """What the id adds when nothing stands before it."""
        piece = self[token_id]
        return piece if isinstance(piece, bytes) and not piece.isascii() else self.backend.decode([token_id], skip_special_tokens=False)


def _kind(decoder: dict[str, Any]) -> str | None:
    """bytes: the GPT-2 way; runs: the SentencePiece way with byte fallback; None: unknown, so nothing may be assumed."""
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    names = [step["type"] for step in steps]
    if names == ["ByteLevel"]:
        return "bytes"
    if names and names[-1] == "Strip":  # drops a leading space of the whole text, if the tokens were fused before
        if steps[-1].get("stop", 0) != 0 or "Fuse" not in names:
            return None
        names.pop()
    while names and names[0] == "Replace":
        names.pop(0)
    return "runs" if names in (["ByteFallback", "Fuse"], ["ByteFallback"]) else None


def _anchor(backend: tokenizers.Tokenizer, special_ids: frozenset[int]) -> int | None:
    """A token of plain letters, so that `anchor + id` shows what id adds in the middle of a text."""
    for letter in "aetoinshrdlu":
        token_id = backend.token_to_id(letter)
        if token_id is not None and token_id not in special_ids and backend.decode([token_id], skip_special_tokens=False) == letter:
            return token_id
    return None


def _byte_level_alphabet() -> dict[str, int]:
    """The GPT-2 byte alphabet: printable Latin-1 stands for itself, every other byte for the next character from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(0x100 + place): value for place, value in enumerate(rest)}
