"""The engine behind an OpenAI endpoint. Nothing of the server is imported before it is used."""

from __future__ import annotations


def client(model: str | None = None) -> dict[str, str]:
    """What an OpenAI client on this machine needs for a server of this user's: its base_url and api_key.

    The server of `model`, or the only one; several that would do are an error that names them.

    >>> client = openai.OpenAI(**nbengine.serve.client())   # doctest: +SKIP
    """
    from nbengine.serve.announce import list_live

    live = [one for one in list_live() if "url" in one]
    found = [one for one in live if model is None or model in one["models"]]
    if len(found) == 1:
        return {"base_url": f"{found[0]['url']}/v1", "api_key": found[0]["secret"]}
    served = "; ".join(f"{', '.join(one['models'])} by process {one['pid']}" for one in live) or "none"
    if not found:
        raise LookupError(f"no server of {model or 'a model'} is running here: start one with engine.serve(). Running: {served}")
    raise LookupError(
        f"{len(found)} servers would do; running: {served}. Name a model, or make a client from server.base_url and server.api_key"
    )
