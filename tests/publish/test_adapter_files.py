"""vllm_flexft/publish/adapter_files.py against real PEFT and real vLLM."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_flexft.config import LINEAR_MODULES, JobError, PeftConfig
from vllm_flexft.publish.adapter_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterError,
    adapter_key,
    check_init_adapter,
    parse_adapter_key,
    read_adapter,
    write_adapter,
)

BASE = "some/base-model"
LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
CASES = {
    "all-linear": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "subset, layers, rslora": {
        "r": 3,
        "lora_alpha": 7.5,
        "target_modules": ("q_proj", "down_proj"),
        "layers_to_transform": (0, 2),
        "use_rslora": True,
    },
}


@pytest.fixture
def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LLAMA).eval()


def trained_peft_model(base: LlamaForCausalLM, keys: dict) -> PeftModel:
    """A PEFT model whose A and B are all random, as after training."""
    layers = keys.get("layers_to_transform")
    targets = keys["target_modules"]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=keys["r"],
        lora_alpha=keys["lora_alpha"],
        target_modules=list(LINEAR_MODULES if targets == "all-linear" else targets),
        layers_to_transform=list(layers) if layers else None,
        use_rslora=keys.get("use_rslora", False),
    )
    model = get_peft_model(base, config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tensors_of(model: PeftModel) -> dict[str, torch.Tensor]:
    return {
        name.replace(".default", ""): p.detach()
        for name, p in model.named_parameters()
        if "lora_" in name
    }


@pytest.fixture(params=CASES.values(), ids=CASES)
def written(request, base, tmp_path):
    """(our folder, PEFT's folder, PEFT's model) of the same trained adapter."""
    model = trained_peft_model(base, request.param)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    write_adapter(ours, tensors_of(model), PeftConfig(**request.param), BASE)
    model.save_pretrained(theirs)
    return ours, theirs, model


def test_the_weights_file_is_the_one_peft_writes(written) -> None:
    ours, theirs, _ = written
    assert (ours / WEIGHTS_FILE).read_bytes() == (theirs / WEIGHTS_FILE).read_bytes()


def test_peft_reads_the_config_as_it_reads_its_own(written) -> None:
    ours, theirs, _ = written
    read, expected = (LoraConfig.from_pretrained(str(f)).to_dict() for f in (ours, theirs))
    # These two do not matter to the function: where the base came from, and who wrote the file.
    for key in ("base_model_name_or_path", "peft_version"):
        read.pop(key, None), expected.pop(key, None)
    assert read == expected


def test_the_config_names_the_base_model_and_what_was_trained(written) -> None:
    ours, _, model = written
    config = json.loads((ours / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == BASE
    assert set(config["target_modules"]) == model.peft_config["default"].target_modules


def test_peft_loads_it_and_computes_the_same_logits(written) -> None:
    ours, _, model = written
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM(LLAMA).eval(), str(ours))
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_vllm_loads_it_with_the_same_deltas(written) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    ours, _, model = written
    helper = PEFTHelper.from_local_dir(str(ours), max_position_embeddings=None)
    helper.validate_legal(LoRAConfig(max_lora_rank=8))
    loaded = LoRAModel.from_local_checkpoint(
        str(ours), set(LINEAR_MODULES), helper, device="cpu", dtype=torch.float32
    )
    layers = {n.replace("base_model.model.", ""): m for n, m in model.named_modules()}
    assert len(loaded.loras) == sum(hasattr(m, "lora_A") for m in layers.values()) > 0
    for name, lora in loaded.loras.items():
        delta = lora.lora_b @ lora.lora_a * lora.scaling
        torch.testing.assert_close(delta, layers[name].get_delta_weight("default"))


def test_bf16_tensors_are_written_as_float32(tmp_path, make_state, peft) -> None:
    tensors = {k: t.bfloat16() for k, t in make_state(1).adapter.items()}
    write_adapter(tmp_path, tensors, peft, BASE)
    written = load_file(tmp_path / WEIGHTS_FILE)
    assert written.keys() == tensors.keys()
    for key, tensor in written.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensors[key].float())


def test_what_was_written_is_read_back(tmp_path, make_state, peft) -> None:
    state = make_state(1)
    write_adapter(tmp_path, state.adapter, peft, BASE)
    tensors, config = read_adapter(tmp_path)
    assert tensors.keys() == state.adapter.keys()
    assert all(torch.equal(tensors[k], state.adapter[k]) for k in tensors)
    assert (config.r, config.lora_alpha, config.use_rslora) == (4, 8, False)
    assert (config.target_modules, config.layers) == (("q_proj", "o_proj"), (0, 1))
    assert config.base_model == BASE


def test_an_adapter_saved_by_peft_is_read(written) -> None:
    _, theirs, model = written
    tensors, config = read_adapter(theirs)
    expected = tensors_of(model)
    assert all(torch.equal(tensors[k], expected[k]) for k in expected)
    assert config.lora_alpha == model.peft_config["default"].lora_alpha


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"bias": "all"}, "bias 'all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base weights"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"r": 5}, "has rank 4, adapter_config.json says r = 5"),
        ({"lora_alpha": None}, "lora_alpha is None"),
    ],
)
def test_another_function_than_plain_lora_is_refused(
    keys, message, tmp_path, make_state, peft
) -> None:
    write_adapter(tmp_path, make_state(1).adapter, peft, BASE)
    path = tmp_path / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    with pytest.raises(AdapterError, match=message) as e:
        read_adapter(tmp_path)
    assert isinstance(e.value, JobError)


def test_lora_dropout_is_ignored(tmp_path, make_state, peft) -> None:
    write_adapter(tmp_path, make_state(1).adapter, peft, BASE)
    path = tmp_path / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_dropout": 0.1}))
    read_adapter(tmp_path)


A0, B0 = adapter_key(0, "q_proj", "A"), adapter_key(0, "q_proj", "B")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(B0), "layer 0 has no q_proj.lora_B"),
        (lambda t: t.update({A0: torch.zeros(5, 32)}), "different ranks"),
        (lambda t: t.update({A0: torch.zeros(4)}), "is not a matrix"),
        (lambda t: t.update({A0: torch.full((4, 32), torch.nan)}), "not finite"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(1)}), "lm_head"),
        (lambda t: t.clear(), "no LoRA weights"),
    ],
)
def test_incomplete_or_foreign_weights_are_refused(
    change, message, tmp_path, make_state, peft
) -> None:
    write_adapter(tmp_path, make_state(1).adapter, peft, BASE)
    tensors = dict(make_state(1).adapter)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path)


def test_a_missing_or_damaged_file_is_named(tmp_path, make_state, peft) -> None:
    with pytest.raises(AdapterError, match=f"{tmp_path} is no PEFT adapter"):
        read_adapter(tmp_path)
    write_adapter(tmp_path, make_state(1).adapter, peft, BASE)
    (tmp_path / WEIGHTS_FILE).write_bytes((tmp_path / WEIGHTS_FILE).read_bytes()[:-1])
    with pytest.raises(AdapterError, match=f"{WEIGHTS_FILE} cannot be read"):
        read_adapter(tmp_path)
    (tmp_path / WEIGHTS_FILE).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"convert adapter_model\.bin"):
        read_adapter(tmp_path)
    (tmp_path / CONFIG_FILE).write_text("{")
    with pytest.raises(AdapterError, match=f"{CONFIG_FILE} cannot be read"):
        read_adapter(tmp_path)


def test_an_init_adapter_of_another_shape_is_refused_with_each_difference(
    tmp_path, make_state, peft
) -> None:
    write_adapter(tmp_path, make_state(1).adapter, peft, BASE)
    _, config = read_adapter(tmp_path)
    check_init_adapter(config, peft, ["o_proj", "q_proj"], [0, 1])
    other = PeftConfig(r=8, lora_alpha=8, target_modules="all-linear")
    with pytest.raises(AdapterError) as e:
        check_init_adapter(config, other, LINEAR_MODULES, [0, 1])
    assert "r: adapter 4, job 8" in str(e.value)
    assert "target_modules" in str(e.value)
    assert "lora_alpha" not in str(e.value)


@pytest.mark.parametrize("module", LINEAR_MODULES)
def test_keys_are_parsed_as_they_are_made(module) -> None:
    assert parse_adapter_key(adapter_key(12, module, "B")) == (12, module, "B")


def test_a_key_in_the_wrong_block_is_refused() -> None:
    with pytest.raises(ValueError, match="none of the LoRA weights"):
        parse_adapter_key("base_model.model.model.layers.0.mlp.q_proj.lora_A.weight")
