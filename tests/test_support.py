"""Every unsupported option is refused at start, by name, before an engine exists."""

import json
import re
from argparse import Namespace

import pytest
from harness.model_config import save_config
from transformers import BertConfig, Qwen2MoeConfig, WhisperConfig
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from vllm_flexft import plugin, support
from vllm_flexft.config import ServerOptions

plugin.register()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_config(tmp_path_factory.mktemp("llama"))


def start(model, **kwargs):
    return EngineArgs(
        model=model, additional_config={"co_finetune": []}, **kwargs
    ).create_engine_config()


def refusal(model, **kwargs):
    with pytest.raises(ValueError) as error:
        start(model, **kwargs)
    return str(error.value)


REFUSED_ARGUMENTS = [
    ("--pipeline-parallel-size", {"pipeline_parallel_size": 2}),
    ("--tensor-parallel-size", {"tensor_parallel_size": 2}),
    ("--data-parallel-size", {"data_parallel_size": 2}),
    ("--data-parallel-size", {"data_parallel_external_lb": True}),
    ("--prefill-context-parallel-size", {"prefill_context_parallel_size": 2}),
    ("--decode-context-parallel-size", {"decode_context_parallel_size": 2}),
    ("--enable-elastic-ep", {"enable_elastic_ep": True}),
    ("--enable-eplb", {"enable_eplb": True}),
    ("--nnodes", {"nnodes": 2}),
    ("--distributed-executor-backend", {"distributed_executor_backend": "ray"}),
    ("--speculative-config", {"speculative_config": {"method": "ngram"}}),
    ("--speculative-config", {"spec_method": "ngram"}),
    ("--kv-transfer-config", {"kv_transfer_config": {"kv_connector": "NixlConnector"}}),
    ("--kv-offloading-size", {"kv_offloading_size": 1.0}),
    ("--ec-transfer-config", {"ec_transfer_config": {"ec_connector": "x"}}),
    ("--kv-sharing-fast-prefill", {"kv_sharing_fast_prefill": True}),
    ("--no-enable-chunked-prefill", {"enable_chunked_prefill": False}),
    ("--enable-dbo", {"enable_dbo": True}),
    ("--enable-sleep-mode", {"enable_sleep_mode": True}),
    ("--cpu-offload-gb", {"cpu_offload_gb": 1.0}),
    ("--offload-group-size", {"offload_group_size": 2}),
    ("--weight-transfer-config", {"weight_transfer_config": {"backend": "nccl"}}),
    ("--quantization", {"quantization": "fp8"}),
    ("--kv-cache-dtype-skip-layers", {"kv_cache_dtype_skip_layers": ["0"]}),
    ("--fully-sharded-loras", {"fully_sharded_loras": True}),
    ("--skip-tokenizer-init", {"skip_tokenizer_init": True}),
    ("--skip-tokenizer-init", {"tokens_only": True}),
    ("--runner pooling", {"runner": "pooling"}),
    ("--runner pooling", {"convert": "embed"}),
    ("--model-impl", {"model_impl": "transformers"}),
    ("--scheduler-cls", {"scheduler_cls": "mine.Scheduler"}),
    ("--worker-cls", {"worker_cls": "mine.Worker"}),
]


@pytest.mark.parametrize(("option", "kwargs"), REFUSED_ARGUMENTS)
def test_argument_is_refused_by_name_with_what_to_do(model, option, kwargs):
    message = refusal(model, **kwargs)
    assert re.fullmatch(
        f"--co-finetune does not work with {re.escape(option)}: .*", message, flags=re.DOTALL
    )


def test_every_refused_argument_has_a_test():
    assert {option for option, _ in REFUSED_ARGUMENTS} == {o.option for o in support._ENGINE_ARGS}


@pytest.mark.parametrize("name", ["VLLM_USE_RUST_FRONTEND", "VLLM_LORA_ENABLE_DUAL_STREAM"])
def test_environment_variable_is_refused_by_name(model, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert name in refusal(model)


def test_model_runner_v2_is_refused_on_cpu(model, monkeypatch):
    """Which vLLM takes where Triton knows the CPU."""
    args = EngineArgs(model=model, additional_config={"co_finetune": []})
    config = args.create_engine_config()
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", property(lambda _: True))
    with pytest.raises(ValueError, match="model runner V2 on CPU: unset VLLM_USE_V2_MODEL"):
        support.check_engine_config(config)


def test_headless_engine_is_refused(model):
    with pytest.raises(ValueError, match="--headless"):
        EngineArgs(model=model, additional_config={"co_finetune": []}).create_engine_config(
            headless=True
        )


def test_grpc_front_end_is_refused():
    with pytest.raises(ValueError, match="--grpc"):
        support.check_front_end(Namespace(grpc=True))


def test_other_vllm_version_is_refused(model, monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.33.0")
    assert "vLLM 0.33.0" in refusal(model)


@pytest.mark.parametrize("device", ["rocm", "xpu"])
def test_other_platform_is_refused(model, monkeypatch, device):
    monkeypatch.setattr(current_platform, "device_type", device, raising=False)
    monkeypatch.setattr(current_platform, "device_name", device, raising=False)
    assert f"platform {device}: use one of: cpu" in refusal(model)


def test_cuda_is_refused_with_the_option_that_tries_it(model, monkeypatch):
    monkeypatch.setattr(current_platform, "device_type", "cuda", raising=False)
    message = refusal(model)
    assert "platform cuda" in message
    assert "docs/gpu.md" in message
    option = json.loads(re.search(r"--co-finetune-config '(.*)'", message)[1])
    assert option == {"experimental_cuda": True}
    options = ServerOptions.from_mapping(option)
    support.check_engine_args(EngineArgs(model=model), experimental_cuda=options.experimental_cuda)


@pytest.mark.parametrize(
    ("named", "kwargs"),
    [
        ("--dtype float16", {"dtype": "float16"}),
        ("--kv-cache-dtype fp8", {"kv_cache_dtype": "fp8"}),
        ("--lora-dtype float16", {"lora_dtype": "float16"}),
    ],
)
def test_type_is_refused_by_name(model, named, kwargs):
    assert f"does not work with {named}" in refusal(model, **kwargs)


def test_mixture_of_experts_is_refused_with_the_supported_architectures(tmp_path):
    model = save_config(
        tmp_path, Qwen2MoeConfig, "Qwen2MoeForCausalLM", num_experts=4, num_experts_per_tok=2
    )
    assert refusal(model) == (
        "--co-finetune does not work with architecture Qwen2MoeForCausalLM: supported are "
        "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
    )


def test_other_dense_architecture_is_refused(tmp_path):
    model = save_config(tmp_path, architecture="AquilaForCausalLM")
    assert "architecture AquilaForCausalLM" in refusal(model)


@pytest.mark.parametrize(
    ("named", "quantization"),
    [
        ("awq", {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}),
        (
            "auto_gptq",
            {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
        ),
        ("fp8", {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    ],
)
def test_quantised_checkpoint_is_refused(tmp_path, named, quantization):
    model = save_config(tmp_path, quantization_config=quantization)
    assert f"quantization {named} of the model: serve an unquantised" in refusal(model)


def test_encoder_decoder_and_multimodal_models_are_refused(tmp_path):
    WhisperConfig(architectures=["WhisperForConditionalGeneration"]).save_pretrained(tmp_path)
    assert "architecture WhisperForConditionalGeneration" in refusal(str(tmp_path))


@pytest.mark.parametrize("kind", ["embedding", "classification"])
def test_pooling_models_are_refused(tmp_path, kind):
    if kind == "embedding":
        BertConfig(architectures=["BertModel"]).save_pretrained(tmp_path)
    else:
        save_config(tmp_path, architecture="LlamaForSequenceClassification")
    assert "runner pooling: co-serving needs a generating model" in refusal(str(tmp_path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_supported_model_starts(model, dtype):
    assert start(model, dtype=dtype).lora_config is not None


def test_fp32_is_refused_on_cuda_where_lora_kernels_take_none(model, monkeypatch):
    config = start(model, dtype="float32")
    monkeypatch.setattr(current_platform, "device_type", "cuda", raising=False)
    with pytest.raises(ValueError, match=r"--dtype float32: use one of: bfloat16$"):
        support.check_engine_config(config)
