"""The endpoint plugin in a real FastAPI app, as vLLM loads it."""

import asyncio
import contextlib
from argparse import Namespace
from types import SimpleNamespace

from fastapi import FastAPI
from starlette.datastructures import State
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

from vllm_flexft.api.endpoint import FlexftEndpoint
from vllm_flexft.wiring import JOBS_KEY, OPTIONS_KEY, RESERVED_NAMES_KEY


def engine_client(additional_config):
    vllm_config = SimpleNamespace(
        additional_config=additional_config,
        lora_config=SimpleNamespace(max_loras=2),
        model_config=SimpleNamespace(model="base"),
    )
    return SimpleNamespace(vllm_config=vllm_config, errored=False)


def co_serving(tmp_path):
    options = {"state_dir": str(tmp_path)}
    return engine_client({JOBS_KEY: [], OPTIONS_KEY: options, RESERVED_NAMES_KEY: []})


def state():
    return State({"openai_serving_models": SimpleNamespace()})


def watchers():
    return [task for task in asyncio.all_tasks() if task.get_name() == "flexft-adapters"]


def test_endpoint_satisfies_the_protocol_of_vllm():
    assert isinstance(FlexftEndpoint(), EndpointPlugin)


def test_watcher_stops_with_the_app(tmp_path):
    async def run():
        endpoint, closed = FlexftEndpoint(), []

        @contextlib.asynccontextmanager
        async def vllm_lifespan(app):
            yield
            closed.append(watchers())

        app = FastAPI(lifespan=vllm_lifespan)
        endpoint.attach_router(app)
        await endpoint.init_state(co_serving(tmp_path), state(), Namespace())
        async with app.router.lifespan_context(app):
            assert len(watchers()) == 1
        return closed

    assert asyncio.run(run()) == [[]]


def test_server_that_does_not_co_serve_gets_no_watcher():
    async def run():
        await FlexftEndpoint().init_state(engine_client({}), state(), Namespace())
        return watchers()

    assert asyncio.run(run()) == []


def test_render_server_without_an_engine_gets_no_watcher():
    async def run():
        await FlexftEndpoint().init_state(None, state(), Namespace())
        return watchers()

    assert asyncio.run(run()) == []


def test_vllm_loads_the_endpoint_once_the_flag_has_set_the_allowlist(monkeypatch):
    from vllm import envs
    from vllm.plugins import load_endpoint_plugins

    from vllm_flexft.plugin import allow_plugins

    envs.disable_envs_cache()  # an engine started earlier in this process turned it on
    monkeypatch.setenv("VLLM_PLUGINS", "")  # so that monkeypatch restores what follows
    monkeypatch.delenv("VLLM_PLUGINS")
    allow_plugins()
    assert FlexftEndpoint in [type(plugin) for plugin in load_endpoint_plugins(("generate",))]
