"""Serves every adapter version that the job store announces, and stops when it is retired.

Several API servers may watch the same store: each registers each version, under the same adapter
number, which is derived from the version's row in the store. vLLM's own counter could not be used,
it counts in each process on its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_flexft.wiring import SERVED_LORA_ID_BASE

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    from vllm_flexft.jobs.records import Version
    from vllm_flexft.jobs.store import JobStore

logger = logging.getLogger("vllm.flexft")

# A client that sees its job succeed and asks for the model at once waits at most this long.
POLL_S = 0.25


class AdapterWatcher:
    """Keeps vLLM's list of served models in step with the job store.

    Args:
        store: closed by `stop`.
        models: vLLM's list of served models.
        engine_client: loads the adapters.
        base_model: only versions trained on this model are served.
        poll_s: seconds between two looks at the store.
    """

    def __init__(
        self,
        *,
        store: JobStore,
        models: OpenAIServingModels,
        engine_client: EngineClient,
        base_model: str,
        poll_s: float = POLL_S,
    ) -> None:
        self._store = store
        self._models = models
        self._engine_client = engine_client
        self._base_model = base_model
        self._poll_s = poll_s
        self._served: dict[int, str] = {}  # version id -> name
        self._refused: set[int] = set()
        self._base_model_of: dict[str, str | None] = {}  # job id -> model
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serve what is published already, then watch in a task of the running loop."""
        await self._update_once()
        self._task = asyncio.create_task(self._watch(), name="flexft-adapters")

    async def stop(self) -> None:
        """Stop watching and close the store."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        self._store.close()

    async def update(self) -> None:
        """Serve versions not seen before, stop serving retired ones."""
        for version in await asyncio.to_thread(self._versions):
            if version.retired:
                await self._withdraw(version)
            elif version.id not in self._served and version.id not in self._refused:
                problem = await self._serve(version)
                if problem is None:
                    self._served[version.id] = version.name
                else:
                    self._refused.add(version.id)
                    logger.error("Adapter %s is not served: %s", version.name, problem)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            # vLLM stops the engine before the app: what fails then is no news.
            if self._engine_client.errored:
                return
            await self._update_once()

    async def _update_once(self) -> None:
        """An update that fails, on a full disk say, is tried again at the next look."""
        try:
            await self.update()
        except Exception:
            logger.exception("Could not look for published adapters; trying again")

    def _versions(self) -> Sequence[Version]:
        """This model's versions. Runs in a thread: it reads from disk."""
        versions = self._store.versions()
        for job_id in {version.job_id for version in versions} - self._base_model_of.keys():
            self._base_model_of[job_id] = self._store.get(job_id).model
        return [v for v in versions if self._base_model_of[v.job_id] == self._base_model]

    async def _serve(self, version: Version) -> str | None:
        """Register one version with vLLM; returns what is in the way, None when it is served.

        Follows `OpenAIServingModels.load_lora_adapter`, which would give a number of its own.
        """
        from vllm.lora.request import LoRARequest

        models, name = self._models, version.name
        async with models.lora_resolver_lock[name]:
            if models.is_base_model(name) or name in models.lora_requests:
                return f"a model of this name is served already; its folder is {version.path}"
            if not (Path(version.path) / "adapter_config.json").is_file():
                return f"there is no adapter in its folder {version.path}"
            request = LoRARequest(
                lora_name=name,
                lora_int_id=SERVED_LORA_ID_BASE + version.id,
                lora_path=version.path,
            )
            try:
                # Also checks that it can be loaded: a failure during a step would end the engine.
                await self._engine_client.add_lora(request)
            except Exception as error:
                return f"vLLM could not load {version.path}: {error}"
            models.lora_requests[name] = request
        logger.info("Adapter %s is served from %s", name, version.path)
        return None

    async def _withdraw(self, version: Version) -> None:
        name = self._served.pop(version.id, None)
        if name is None:
            return
        async with self._models.lora_resolver_lock[name]:
            served: Any = self._models.lora_requests.get(name)
            if served is not None and served.lora_path == version.path:
                del self._models.lora_requests[name]
        logger.info("Adapter %s is no longer served: its folder was pruned", name)
