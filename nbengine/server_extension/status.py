"""A page, for people and for programs, of the engines that were found."""

from __future__ import annotations

import json
from typing import Any

from jupyter_core.utils import ensure_async
from tornado.escape import xhtml_escape

import nbengine
from nbengine.server_extension.base import OpenAIHandler, may

PAGE = """<!doctype html>
<meta charset="utf-8">
<title>nbengine</title>
<h1>Engines of this server's kernels</h1>
{table}
<p>OpenAI clients find them at <code>{url}</code>; their API key is a Jupyter token of this server.</p>
"""
TABLE = """<table>
<tr><th align="left">Model<th align="left">Kernel<th align="left">Notebook<th align="left">State<th align="right">Requests
{rows}
</table>"""


class StatusHandler(OpenAIHandler):
    @may("read")
    async def get(self) -> None:
        found = await self._found()
        if self._for_a_person:
            self.finish(self._page(found), set_content_type="text/html; charset=utf-8")
        else:
            self.finish(json.dumps({"version": nbengine.__version__, "base_url": self._url, "engines": found}))

    def get_login_url(self) -> str:
        """A person is sent there, by the server's own means: JupyterHub has others."""
        return str(self.settings["login_url"]) if self._for_a_person else super().get_login_url()

    def refuse_stranger(self) -> None:
        if not (self._for_a_person and self.request.method == "GET"):
            super().refuse_stranger()

    @property
    def _for_a_person(self) -> bool:
        return "text/html" in self.request.headers.get("Accept", "")

    @property
    def _url(self) -> str:
        return f"{self.request.protocol}://{self.request.host}{self.base_url}nbengine/v1"

    async def _found(self) -> list[dict[str, Any]]:
        """No secret and no address: a client has no use for them."""
        engines = self.app.engines.live()
        sessions: list[dict[str, Any]] = await ensure_async(self.session_manager.list_sessions())
        notebooks = {session["kernel"]["id"]: session["path"] for session in sessions}
        names = self.app.engines.names(engines)
        return [
            {
                "kernel": engine.short,
                "number": engine.number,
                "kernel_id": engine.kernel_id,
                "notebook": notebooks.get(engine.kernel_id),
                "state": engine.state,
                "models": [name for name, (one, _) in names.items() if one == engine],
                "requests": self.app.activity.running[engine.label],
            }
            for engine in engines
        ]

    def _page(self, found: list[dict[str, Any]]) -> str:
        cells = [
            (", ".join(one["models"]), f"{one['kernel']}.{one['number']}", one["notebook"] or "", one["state"], str(one["requests"]))
            for one in found
        ]
        rows = "\n".join("<tr>" + "".join(f"<td>{xhtml_escape(cell)}" for cell in row) for row in cells)
        table = TABLE.format(rows=rows) if found else f"<p>{xhtml_escape(self.app.engines.offer([]))}.</p>"
        return PAGE.format(table=table, url=xhtml_escape(self._url))
