"""The extension: what it keeps for the server that loaded it, and which address goes to which handler."""

from __future__ import annotations

from typing import Any

from jupyter_server.extension.application import ExtensionApp
from traitlets import Integer

from nbengine.server_extension import fleet, relay, status
from nbengine.server_extension.activity import Activity
from nbengine.server_extension.engines import Engines


class NBEngineApp(ExtensionApp):
    """`c.NBEngineApp.max_body_size = ...` in a server's configuration sets it."""

    name = "nbengine"

    max_body_size = Integer(8 << 20, min=1, help="The largest body of a request, in bytes.").tag(config=True)

    engines: Engines
    activity: Activity

    def initialize_settings(self) -> None:
        assert self.serverapp is not None
        self.engines = Engines(self.serverapp.kernel_manager.list_kernel_ids)
        self.activity = Activity(self.serverapp.kernel_manager, self.serverapp.web_app.settings)

    def initialize_handlers(self) -> None:
        routes: list[tuple[str, Any]] = [
            (r"/nbengine/?", status.StatusHandler),
            (r"/nbengine/v1/models", fleet.ModelsHandler),
            (r"/nbengine/v1/models/(.+)", fleet.ModelHandler),
            (r"/nbengine/health", fleet.HealthHandler),
            (r"/nbengine/load", fleet.LoadHandler),
            (r"/nbengine/metrics", fleet.MetricsHandler),
            (r"/nbengine/openapi\.json", fleet.OpenAPIHandler),
            (r"/nbengine/version", fleet.VersionHandler),
            (r"/nbengine/kernels/([^/]+)(/.+)", relay.KernelHandler),
            (r"/nbengine(/v1/.+|/tokenize|/detokenize)", relay.ModelHandler),
            (r"/nbengine/.*", relay.NothingHandler),
        ]
        self.handlers.extend(routes)

    async def stop_extension(self) -> None:
        self.activity.stop()
