"""What all engines answer together: their models, health, load and metrics."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import nbengine
from nbengine.server_extension.base import OpenAIHandler, may
from nbengine.server_extension.engines import Engine
from nbengine.server_extension.metrics import merge
from nbengine.server_extension.refusals import unavailable
from nbengine.server_extension.upstream import Answer, fetch


class FleetHandler(OpenAIHandler):
    async def ask(self, path: str) -> list[tuple[Engine, Answer]]:
        """What every engine answers; those that do not are left out."""
        engines = self.app.engines.live()
        answers = await asyncio.gather(*(fetch(engine, path) for engine in engines))
        return [(engine, answer) for engine, answer in zip(engines, answers, strict=True) if answer is not None]

    async def models(self) -> list[dict[str, Any]]:
        """As the engines describe them, under the names that clients are to use."""
        found = await self.ask("/v1/models")
        names = self.app.engines.names([engine for engine, _ in found])
        shown = {(engine, model): name for name, (engine, model) in names.items()}
        described = [(engine, model) for engine, answer in found if answer.status == 200 for model in json.loads(answer.body)["data"]]
        return [{**model, "id": shown.get((engine, model["id"]), f"{model['id']}@{engine.label}")} for engine, model in described]


class ModelsHandler(FleetHandler):
    @may("read")
    async def get(self) -> None:
        self.finish(json.dumps({"object": "list", "data": await self.models()}))


class ModelHandler(FleetHandler):
    @may("read")
    async def get(self, name: str) -> None:
        engine, plain = self.app.engines.find(name)
        answer = await fetch(engine, "/v1/models")
        described = json.loads(answer.body)["data"] if answer is not None and answer.status == 200 else []
        for model in described:
            if model["id"] == plain:
                self.finish(json.dumps({**model, "id": name}))
                return
        raise unavailable(f"the engine of kernel {engine.short} does not answer", "engine_gone")


class HealthHandler(FleetHandler):
    @may("read")
    async def get(self) -> None:
        """200 while any engine is well."""
        answers = {engine.label: answer.status for engine, answer in await self.ask("/health")}
        if 200 not in answers.values():
            raise unavailable(self.app.engines.offer([]) if not answers else "no engine is ready", "no_engine")
        self.finish(json.dumps({"engines": answers}))


class LoadHandler(FleetHandler):
    @may("read")
    async def get(self) -> None:
        found = [(engine, json.loads(answer.body)) for engine, answer in await self.ask("/load") if answer.status == 200]
        loads = {engine.engine_id or engine: told["server_load"] for engine, told in found}  # two servers of an engine tell the same
        self.finish(json.dumps({"server_load": sum(loads.values())}))


class MetricsHandler(FleetHandler):
    @may("read")
    async def get(self) -> None:
        pages = [(engine.labels, answer.body.decode()) for engine, answer in await self.ask("/metrics") if answer.status == 200]
        self.finish(merge(pages), set_content_type="text/plain; version=0.0.4; charset=utf-8")


class OpenAPIHandler(FleetHandler):
    @may("read")
    async def get(self) -> None:
        from nbengine.serve.openapi import description

        self.finish(json.dumps({**description(), "servers": [{"url": f"{self.base_url}nbengine"}]}))


class VersionHandler(FleetHandler):
    @may("read")
    async def get(self) -> None:
        self.finish(json.dumps({"version": nbengine.__version__}))
