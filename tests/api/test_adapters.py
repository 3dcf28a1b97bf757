"""Published adapters become served models, with vLLM's real model list and a real job store.

Only the engine behind them is a stand-in: it notes which adapters it was told to load.
"""

import asyncio
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.lora.request import LoRARequest

from vllm_flexft.api import adapters
from vllm_flexft.api.adapters import AdapterWatcher
from vllm_flexft.config import FinetuneJob
from vllm_flexft.jobs.store import JobStore

MODEL = "base/model"


class Engine:
    """Loads every adapter but those in `broken`."""

    def __init__(self):
        self.loaded, self.broken, self.errored = [], set(), False
        self.model_config = SimpleNamespace(max_model_len=128, model=MODEL)
        self.renderer = self.input_processor = None

    async def add_lora(self, request):
        if request.lora_name in self.broken:
            raise ValueError("rank 64 is greater than max_lora_rank 16")
        self.loaded.append((request.lora_name, request.lora_int_id))
        return True


class Server:
    """One API server process: its model list and its watcher."""

    def __init__(self, path):
        self.engine = Engine()
        self.models = OpenAIServingModels(
            self.engine, [BaseModelPath(name="base", model_path=MODEL)]
        )
        self.watcher = AdapterWatcher(
            store=JobStore(path),
            models=self.models,
            engine_client=self.engine,
            base_model=MODEL,
            poll_s=0.01,
        )

    async def names(self):
        return [card.id for card in (await self.models.show_available_models()).data]


@pytest.fixture
def store_path(tmp_path):
    return tmp_path / "jobs.sqlite3"


@pytest.fixture
def store(store_path):
    store = JobStore(store_path)
    yield store
    store.close()


@pytest.fixture
def server(store_path):
    return Server(store_path)


def write_files(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({"A": np.zeros((2, 3))}, folder / "adapter_model.safetensors")


@pytest.fixture
def publish(store, tmp_path):
    def publish(name, model=MODEL, folder=True, final=True):
        job = FinetuneJob.from_mapping(
            {
                "name": name.split("@")[0],
                "dataset": {"path": "t.jsonl"},
                "output_dir": str(tmp_path / name.split("@")[0]),
            }
        )
        record = store.submit(job, model=model)
        path = tmp_path / "out" / name
        if folder:
            path.mkdir(parents=True)
            write_files(path)
        store.add_version(record.id, name, str(path), step=1, final=final)
        return path

    return publish


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


def test_adapter_published_while_serving_is_listed_and_loaded(server, publish):
    async def run():
        await server.watcher.start()
        publish("tuned")
        await until(lambda: "tuned" in server.models.lora_requests)
        await server.watcher.stop()
        return await server.names()

    assert asyncio.run(run()) == ["base", "tuned"]
    assert [name for name, _ in server.engine.loaded] == ["tuned"]


def test_adapter_published_before_a_restart_is_served_when_start_returns(server, publish):
    publish("tuned")

    async def run():
        await server.watcher.start()
        names = await server.names()
        await server.watcher.stop()
        return names

    assert asyncio.run(run()) == ["base", "tuned"]


def test_several_api_servers_give_an_adapter_the_same_number(store_path, publish):
    publish("one")
    first, second = Server(store_path), Server(store_path)
    first.models.lora_id_counter.inc(5)  # adapters that only this process has loaded

    async def run():
        for server in (first, second):
            await server.watcher.update()
        publish("two")
        for server in (second, first):
            await server.watcher.update()

    asyncio.run(run())
    assert sorted(first.engine.loaded) == sorted(second.engine.loaded)
    assert len({number for _, number in first.engine.loaded}) == 2


def test_adapter_of_another_base_model_is_not_served(server, publish):
    publish("tuned", model="another/model")
    asyncio.run(server.watcher.update())
    assert server.models.lora_requests == {}


@pytest.mark.parametrize("taken", ["base model", "adapter"])
def test_name_served_already_is_logged_and_left_alone(server, publish, caplog, taken):
    name = "base" if taken == "base model" else "mine"
    mine = LoRARequest(lora_name="mine", lora_int_id=1, lora_path="/mine")
    server.models.lora_requests["mine"] = mine
    publish(name)
    asyncio.run(server.watcher.update())
    assert server.models.lora_requests == {"mine": mine}
    assert f"Adapter {name} is not served: a model of this name is served already" in caplog.text


def test_missing_folder_is_logged_and_not_served(server, publish, caplog):
    path = publish("tuned", folder=False)
    asyncio.run(server.watcher.update())
    assert server.models.lora_requests == {}
    assert f"Adapter tuned is not served: there is no adapter in its folder {path}" in caplog.text


def test_adapter_that_vllm_cannot_load_is_logged_once_and_not_served(server, publish, caplog):
    publish("tuned")
    server.engine.broken.add("tuned")
    asyncio.run(server.watcher.update())
    asyncio.run(server.watcher.update())
    assert server.models.lora_requests == {}
    assert caplog.text.count("rank 64 is greater than max_lora_rank 16") == 1


@pytest.mark.parametrize("obstacle", ["load", "folder", "name"])
def test_version_is_served_as_soon_as_what_was_in_the_way_is_gone(
    server, publish, monkeypatch, obstacle
):
    monkeypatch.setattr(adapters, "RETRY_S", 0.01)
    path = publish("tuned", folder=obstacle != "folder")
    if obstacle == "load":
        server.engine.broken.add("tuned")
    elif obstacle == "name":
        server.models.lora_requests["tuned"] = LoRARequest("tuned", 1, "/mine")

    async def run():
        await server.watcher.start()
        assert "tuned" not in dict(server.engine.loaded)
        if obstacle == "folder":
            path.mkdir(parents=True)
            write_files(path)
        elif obstacle == "load":
            server.engine.broken.clear()
        else:
            del server.models.lora_requests["tuned"]
        await until(lambda: "tuned" in dict(server.engine.loaded))
        await server.watcher.stop()

    asyncio.run(run())
    assert server.models.lora_requests["tuned"].lora_path == str(path)


def test_failed_version_is_tried_less_and_less_often(server, publish, monkeypatch):
    publish("tuned")
    server.engine.broken.add("tuned")
    now, tries = [0.0], []
    monkeypatch.setattr(adapters.time, "monotonic", lambda: now[0])
    serve = server.watcher._serve

    async def noted(version):
        tries.append(now[0])
        return await serve(version)

    monkeypatch.setattr(server.watcher, "_serve", noted)
    for now[0] in range(200):
        asyncio.run(server.watcher.update())
    assert tries == [0, 1, 3, 7, 15, 31, 63, 123, 183]


def test_of_a_job_only_the_final_adapter_is_loaded_and_all_are_listed(server, publish):
    for step in (1, 2):
        publish(f"tuned@step-{step}", final=False)
    publish("tuned")
    publish("running@step-1", final=False)
    publish("running@step-2", final=False)
    asyncio.run(server.watcher.update())
    publish("running@step-3", final=False)
    asyncio.run(server.watcher.update())
    assert [name for name, _ in server.engine.loaded] == ["tuned", "running@step-2"]
    assert len(server.models.lora_requests) == 6


def test_checkpoint_of_a_job_that_vllm_cannot_load_is_not_listed(server, publish):
    server.engine.broken.update({"tuned@step-1", "tuned@step-2"})
    for step in (1, 2):
        publish(f"tuned@step-{step}", final=False)
    asyncio.run(server.watcher.update())
    assert server.models.lora_requests == {}


def test_checkpoint_with_weights_cut_short_is_not_listed(server, publish, caplog):
    publish("tuned")
    path = publish("tuned@step-1", final=False)
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    asyncio.run(server.watcher.update())
    assert list(server.models.lora_requests) == ["tuned"]
    assert f"Adapter tuned@step-1 is not served: {weights} cannot be read" in caplog.text


def test_retired_version_is_no_longer_listed(server, publish, store):
    path = publish("tuned@step-1")

    async def run():
        await server.watcher.update()
        store.retire_versions([path])
        shutil.rmtree(path)
        await server.watcher.update()
        return await server.names()

    assert asyncio.run(run()) == ["base"]


def test_an_adapter_trained_anew_in_its_old_folder_is_another_one_to_the_prefix_cache(
    server, publish, store
):
    """vLLM keys cached blocks on the adapter's name and path (`_gen_lora_extra_hash_keys`)."""
    keys = []

    async def scenario():
        for _ in range(3):
            folder = publish("one")
            await server.watcher.update()
            request = server.models.lora_requests["one"]
            keys.append((request.lora_name, request.lora_path, request.lora_int_id))
            assert str(Path(request.lora_path)) == str(folder)
            store.retire_versions([str(folder)])
            shutil.rmtree(folder)
            await server.watcher.update()
            assert await server.names() == ["base"]

    asyncio.run(scenario())
    assert len({key[:2] for key in keys}) == len({key[2] for key in keys}) == 3


def test_store_that_fails_for_a_while_is_tried_again(server, publish, caplog):
    async def run():
        real = server.watcher._store.versions
        server.watcher._store.versions = lambda: 1 / 0
        await server.watcher.start()
        await until(lambda: "Could not look for published adapters" in caplog.text)
        publish("tuned")
        server.watcher._store.versions = real
        await until(lambda: server.models.lora_requests)
        await server.watcher.stop()

    asyncio.run(run())
    assert list(server.models.lora_requests) == ["tuned"]


def test_watching_ends_with_the_engine(server):
    async def run():
        await server.watcher.start()
        server.engine.errored = True
        await until(server.watcher._task.done)
        await server.watcher.stop()

    asyncio.run(run())
