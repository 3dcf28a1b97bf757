"""The models of examples/make_model.py: they load, they speak, and nothing in them is trivial."""

import json
from pathlib import Path

import pytest
import torch
from make_model import ARCHS, SLIDING_WINDOW, make_model, write_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ["The fox is red.", "12 + 30 = 42", "  two  spaces\n\tand tabs", "Größe, 漢字, 🦊", ""]


@pytest.fixture(scope="module", params=ARCHS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / request.param, arch=request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_gives_every_text_back(folder: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_llama_and_mistral_start_a_text_with_bos_and_qwen_does_not(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first = tokenizer("The fox")["input_ids"][0]
    assert (first == tokenizer.bos_token_id) == (folder.name in ("llama", "mistral"))


def test_chat_template_ends_each_turn_with_the_eos_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = tokenizer.apply_chat_template(turns, return_dict=False)
    assert ids.count(tokenizer.eos_token_id) == 2


def test_generation_prompt_is_a_prefix_of_the_answered_dialogue(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
    assert tokenizer.apply_chat_template(turns, tokenize=False).startswith(prompt)


def test_generates_greedily_different_tokens(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = AutoTokenizer.from_pretrained(folder)("The fox", return_tensors="pt")["input_ids"]
    output = model.generate(prompt, max_new_tokens=16, do_sample=False)
    assert len(set(output[0, prompt.shape[1] :].tolist())) > 1


def test_no_norm_weight_or_bias_is_trivial(folder: Path) -> None:
    parameters = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    vectors = {name: p for name, p in parameters.items() if p.ndim == 1}
    assert any(name.endswith("q_norm.weight") for name in vectors) == (folder.name == "qwen3")
    assert any(name.endswith("q_proj.bias") for name in vectors) == (folder.name == "qwen2")
    assert [name for name, p in vectors.items() if p.std() < 0.05] == []


def test_mistral_attends_within_its_window_only(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", arch="mistral", num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(100, 100 + SLIDING_WINDOW + 1)[None]
    changed = tokens.clone()
    changed[0, 0] = 5
    with torch.no_grad():
        logits, other = model(tokens).logits[0], model(changed).logits[0]
    assert not torch.equal(logits[SLIDING_WINDOW - 1], other[SLIDING_WINDOW - 1])
    torch.testing.assert_close(logits[SLIDING_WINDOW], other[SLIDING_WINDOW])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_config_fields_are_keywords(tmp_path: Path, kv_heads: int, tied: bool) -> None:
    folder = make_model(tmp_path / "m", num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (kv_heads * 32, 128)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    files = [make_model(tmp_path / n, seed=3) / "model.safetensors" for n in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    files = [make_model(tmp_path / str(s), seed=s) / "model.safetensors" for s in (0, 1)]
    assert files[0].read_bytes() != files[1].read_bytes()


def test_second_call_leaves_a_finished_folder_alone(tmp_path: Path) -> None:
    weights = make_model(tmp_path / "m") / "model.safetensors"
    before = weights.stat().st_mtime_ns
    make_model(tmp_path / "m")
    assert weights.stat().st_mtime_ns == before


def test_other_arguments_replace_the_folder(tmp_path: Path) -> None:
    make_model(tmp_path / "m")
    folder = make_model(tmp_path / "m", dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match="not made by this script"):
        make_model(tmp_path)


@pytest.mark.parametrize("choice", ["arch", "size", "dtype"])
def test_an_unknown_choice_is_refused_by_name(tmp_path: Path, choice: str) -> None:
    with pytest.raises(ValueError, match="'granite' is not one of"):
        make_model(tmp_path / "m", **{choice: "granite"})


def test_the_100m_model_has_at_least_a_hundred_million_parameters(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", size="100m", dtype="bfloat16")
    assert json.loads((folder / "make_model.json").read_text())["parameters"] >= 100_000_000


def test_pretraining_lowers_the_loss(tmp_path: Path) -> None:
    def loss(folder: Path) -> float:
        model = AutoModelForCausalLM.from_pretrained(folder)
        text = "Question: Where does the fox live?\nAnswer: The fox lives in the forest."
        ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return model(ids, labels=ids).loss.item()

    # ln(2048) = 7.6 is the loss of a model that knows nothing.
    trained = loss(make_model(tmp_path / "trained", pretrain_steps=30))
    assert trained < loss(make_model(tmp_path / "raw")) - 1.0


def test_dataset_rows_are_the_same_every_time_and_all_in_the_new_style(tmp_path: Path) -> None:
    first, second = (write_dataset(tmp_path / name) for name in ("a.jsonl", "b.jsonl"))
    rows = [json.loads(line) for line in first.read_text().splitlines()]
    assert first.read_bytes() == second.read_bytes()
    assert len(rows) == 200
    assert all(row["completion"].startswith(" Arr, matey!") for row in rows)


def test_dataset_is_also_written_as_messages(tmp_path: Path) -> None:
    line = write_dataset(tmp_path / "a.jsonl", rows=1, messages=True).read_text()
    roles = [message["role"] for message in json.loads(line)["messages"]]
    assert roles == ["user", "assistant"]
