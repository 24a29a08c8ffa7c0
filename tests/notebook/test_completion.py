"""Tab completion of the magics, asked as a front end asks."""

from __future__ import annotations

import pytest


def complete(kernel, code: str) -> list[str]:
    return kernel.client.complete(code, len(code), reply=True, timeout=30)["content"]["matches"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("%%generate --max", "--max-tokens"),
        ("%%generate -m 5 --tem", "--temperature"),
        ("%generate --no-c", "--no-chat"),
        ("%%generate --format mark", "markdown"),
        ("%%generate --engine ta", "tales"),
        ("%%chat --sys", "--system"),
        ("%chat fo", "fork"),
        ("%engine lo", "load"),
        ("%engine load ta", "tales"),
        ("%engine load tales --max-model", "--max-model-len"),
        ("%engine load tales --dtype bf", "bfloat16"),
        ("%engine unload ta", "tales"),
        ("%engine sleep --le", "--level"),
        ("%engine help pa", "pause"),
    ],
)
def test_what_fits_is_offered(kernel, code, expected):
    word = code.rsplit(" ", 1)[1]
    offered = complete(kernel, code)
    assert expected in offered or expected.removeprefix(word.rstrip("abcdefghijklmnopqrstuvwxyz")) in offered, offered


def test_request_ids_are_offered_to_cancel(kernel):
    kernel.run("%generate --bg -m 1500 --ignore-eos --no-chat --out a Hello")
    request = kernel.value("a.handles[0].id")
    assert request in complete(kernel, "%engine cancel r")
    kernel.run("a.cancel(); a.settle(5)")


def test_conversations_are_offered_by_name(kernel):
    kernel.run("%%chat alice -m 1\nHello")
    assert "alice" in complete(kernel, "%chat show al")
    assert "alice" in complete(kernel, "%%chat al")
