"""vLLM endpoint plugin: runs in every API server of a co-serving engine.

vLLM calls `attach_router` when it builds the app and `init_state` once the engine is up. There are
no routes yet; what starts here is the task that serves published adapters.
"""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from vllm_flexft.plugin import NAME

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

    from vllm_flexft.api.adapters import AdapterWatcher


class FlexftEndpoint:
    """Implements `vllm.plugins.endpoint_plugins.interface.EndpointPlugin`."""

    name = NAME
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._watcher: AdapterWatcher | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Stop our task with the app, while the event loop still runs."""
        started_by_vllm = app.router.lifespan_context

        @contextlib.asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
            async with started_by_vllm(app) as state:
                try:
                    yield state
                finally:
                    await self.stop()

        app.router.lifespan_context = lifespan

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Serve what is published already, and go on watching for more.

        Does nothing for a server without an engine, or one that does not co-serve.
        """
        if engine_client is None:
            return
        from vllm_flexft.api.adapters import AdapterWatcher
        from vllm_flexft.jobs.store import JobStore
        from vllm_flexft.wiring import CoServeConfig, base_model, job_store_path

        vllm_config = engine_client.vllm_config
        config = CoServeConfig.from_vllm_config(vllm_config)
        if config is None:
            return
        self._watcher = AdapterWatcher(
            store=JobStore(job_store_path(config.options)),
            models=state.openai_serving_models,
            engine_client=engine_client,
            base_model=base_model(vllm_config),
        )
        await self._watcher.start()

    async def stop(self) -> None:
        """Stop watching. Safe to call twice."""
        if self._watcher is not None:
            await self._watcher.stop()
            self._watcher = None
