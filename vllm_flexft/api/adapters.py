"""Serves every adapter version that the job store announces, and stops when it is retired.

Several API servers may watch the same store: each registers each version, under the same adapter
number, which is derived from the version's row in the store. vLLM's own counter could not be used,
it counts in each process on its own.

Only some versions are loaded here: final adapters, and of each job the first one seen, the newest
there is. It stands for the others of the job, which have its shapes: they are registered by name
when their files are whole, and vLLM loads them when a request first asks for them. Loading each
checkpoint would push adapters in use out of vLLM's cache, for one that few ask for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_flexft.publish.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from vllm_flexft.wiring import SERVED_LORA_ID_BASE

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    from vllm_flexft.jobs.records import Version
    from vllm_flexft.jobs.store import JobStore

logger = logging.getLogger("vllm.flexft")

# A client that sees its job succeed and asks for the model at once waits at most this long.
POLL_S = 0.25
RETRY_S = 1.0  # after an adapter could not be served; doubled each time
MAX_RETRY_S = 60.0


@dataclass
class _Failure:
    """A version that is not served yet."""

    problem: str = ""
    retry_s: float = RETRY_S
    next_try: float = 0.0


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
        self._withdrawn: Counter[str] = Counter()  # how often a folder was served before
        self._failures: dict[int, _Failure] = {}  # by version id
        self._loaded_jobs: set[str] = set()  # with a version that vLLM has loaded
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
        versions = await asyncio.to_thread(self._versions)
        # What stands for its job comes first.
        for version in sorted(versions, key=lambda v: (not v.final, -v.id)):
            if version.retired:
                self._failures.pop(version.id, None)
                await self._withdraw(version)
            elif version.id not in self._served:
                await self._try_to_serve(version)

    async def _try_to_serve(self, version: Version) -> None:
        """A failure is logged, again only when its reason changes, and tried again later: the
        folder may come back, the name may become free."""
        failure = self._failures.get(version.id, _Failure())
        if time.monotonic() < failure.next_try:
            return
        problem = await self._serve(version)
        if problem is None:
            self._failures.pop(version.id, None)
            self._served[version.id] = version.name
            return
        if problem != failure.problem:
            logger.error("Adapter %s is not served: %s", version.name, problem)
        failure.problem, failure.next_try = problem, time.monotonic() + failure.retry_s
        failure.retry_s = min(2 * failure.retry_s, MAX_RETRY_S)
        self._failures[version.id] = failure

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
            problem = await asyncio.to_thread(_problem_of_folder, Path(version.path))
            if problem is not None:
                return problem
            request = LoRARequest(
                lora_name=name,
                lora_int_id=SERVED_LORA_ID_BASE + version.id,
                lora_path=self._path_of(version),
            )
            if version.final or version.job_id not in self._loaded_jobs:
                try:
                    # Also checks that it can be: a failure during a step would end the engine.
                    await self._engine_client.add_lora(request)
                except Exception as error:
                    return f"vLLM could not load {version.path}: {error}"
                self._loaded_jobs.add(version.job_id)
            models.lora_requests[name] = request
        logger.info("Adapter %s is served from %s", name, version.path)
        return None

    def _path_of(self, version: Version) -> str:
        """vLLM's prefix cache keys on name and path: where a folder holds another adapter than it
        did, its path must be spelt differently."""
        return version.path + "/." * self._withdrawn[version.path]

    async def _withdraw(self, version: Version) -> None:
        name = self._served.pop(version.id, None)
        if name is None:
            return
        async with self._models.lora_resolver_lock[name]:
            served: Any = self._models.lora_requests.get(name)
            if served is not None and served.lora_path == self._path_of(version):
                del self._models.lora_requests[name]
                self._withdrawn[version.path] += 1
        logger.info("Adapter %s is no longer served: its folder was pruned", name)


def _problem_of_folder(folder: Path) -> str | None:
    """Files that are missing or cut short; a sum of the weights would cost more than it tells."""
    from safetensors import SafetensorError, safe_open

    if not (folder / CONFIG_FILE).is_file():
        return f"there is no adapter in its folder {folder}"
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="np"):  # compares header and file size
            return None
    except (OSError, SafetensorError) as error:
        return f"{folder / WEIGHTS_FILE} cannot be read: {error}"
