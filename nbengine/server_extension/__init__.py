"""What a Jupyter server loads: the engines of its kernels behind one OpenAI endpoint at /nbengine/. Imports no torch."""

from __future__ import annotations

from typing import Any


def _jupyter_server_extension_points() -> list[dict[str, Any]]:
    from nbengine.server_extension.app import NBEngineApp

    return [{"module": "nbengine.server_extension", "app": NBEngineApp}]
