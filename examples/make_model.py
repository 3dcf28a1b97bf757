"""Make a small causal language model with a real tokenizer, without downloads.

    python examples/make_model.py OUT [--arch llama|qwen2|qwen3|mistral] [--size tiny|demo|100m]
    python examples/make_model.py OUT --size demo --dataset rows.jsonl

`tiny` (0.8 M parameters) is for tests, `demo` (7 M) is pre-trained for a minute on generated
text, `100m` (more than 100 M, random weights) is for benchmarks. The folder loads in transformers
and in vLLM. A second call with the same arguments finds the folder finished and returns at once.
"""

import argparse
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sample_text
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

ARCHS = ("llama", "qwen2", "qwen3", "mistral")
# head_dim is one of the sizes that vLLM's CPU attention has (32, 64, 80, 96, 112, 128, ...).
SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(
        vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=1024,
    ),
    "demo": dict(
        vocab_size=2048, hidden_size=320, intermediate_size=896, num_hidden_layers=6,
        num_attention_heads=5, num_key_value_heads=1, head_dim=64, max_position_embeddings=2048,
    ),
    "100m": dict(
        vocab_size=16384, hidden_size=768, intermediate_size=2304, num_hidden_layers=14,
        num_attention_heads=12, num_key_value_heads=4, head_dim=64, max_position_embeddings=4096,
    ),
}  # fmt: skip
SLIDING_WINDOW = 48  # Mistral: short, so that test sequences are longer than it
BOS, END, PAD = "<|bos|>", "<|im_end|>", "<|pad|>"
SPECIAL_TOKENS = [PAD, BOS, "<|im_start|>", END]
CHAT_TEMPLATE = (
    "{bos}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(vocab_size: int, add_bos: bool, seed: int = 0) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on generated text, padded with unused tokens to `vocab_size`.

    `add_bos` puts `<|bos|>` before every text, as Llama's tokenizer does and Qwen's does not. The
    end-of-turn token of the chat template is the EOS token.
    """
    texts = (
        text if isinstance(text, str) else "\n".join(m["content"] for m in text)
        for text in itertools.islice(sample_text.documents(seed), 9000)
    )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)

    # The generated text has fewer words than a large vocabulary has room for. No merge leads to
    # the padding tokens, so they are never encoded, and decoding them gives visible text.
    state = json.loads(trained.to_str())
    vocab = state["model"]["vocab"]
    for token_id in range(len(vocab), vocab_size):
        vocab[f"<unused{token_id}>"] = token_id
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.ByteLevel()
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A",
            pair=f"{BOS} $A {BOS} $B",
            special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS if add_bos else None,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE.replace("{bos}", "{{ bos_token }}" if add_bos else ""),
        clean_up_tokenization_spaces=False,
    )


def init_model(arch: str, config_values: dict[str, Any], seed: int) -> PreTrainedModel:
    """A model of random fp32 weights, none of them trivial.

    Weights have a standard deviation of 1 / sqrt(hidden_size), which keeps activations and logits
    near one. Norm weights are drawn around 1 and biases around 0, so that a test notices if either
    is left out.
    """
    values = dict(config_values)
    values.setdefault("initializer_range", values["hidden_size"] ** -0.5)
    if arch == "mistral":
        values.setdefault("sliding_window", SLIDING_WINDOW)
    config = AutoConfig.for_model(
        arch,
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(END),
        **values,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.normal_(1.0, 0.1)
                elif name.endswith(".bias"):
                    parameter.normal_(0.0, 0.1)
    return model


def training_rows(
    tokenizer: PreTrainedTokenizerFast, seed: int, batch: int, length: int
) -> Iterator[torch.Tensor]:
    """Endless batches of token ids, [batch, length]: documents joined end to end."""
    buffer: list[int] = []
    for document in sample_text.documents(seed):
        if isinstance(document, str):
            buffer += [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
        else:
            buffer += tokenizer.apply_chat_template(document, return_dict=False)
        if len(buffer) >= batch * length:
            yield torch.tensor(buffer[: batch * length]).view(batch, length)
            buffer = buffer[batch * length :]


def pretrain(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int
) -> None:
    """Next-token training on generated text: AdamW, linear warm-up over a tenth, then to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(step / (0.1 * steps) + 0.1, 1.1 * (1 - step / steps))
    )
    start = time.monotonic()
    batches = training_rows(tokenizer, seed + 1, batch=8, length=64)
    model.train()
    for step, tokens in enumerate(itertools.islice(batches, steps), start=1):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step == 1 or step % 50 == 0 or step == steps:
            seconds = time.monotonic() - start
            print(
                f"pre-training: step {step}/{steps}, loss {loss:.2f}, {seconds:.0f} s", flush=True
            )
    model.eval()


def fingerprint(arguments: dict[str, Any]) -> str:
    """SHA-256 over the arguments and the two source files that turn them into a model."""
    digest = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode())
    for source in (__file__, sample_text.__file__):
        digest.update(Path(source).read_bytes())
    return digest.hexdigest()


def make_model(
    out: str | Path,
    *,
    arch: str = "llama",
    size: str = "tiny",
    dtype: str = "float32",
    seed: int = 0,
    pretrain_steps: int | None = None,
    **config: Any,
) -> Path:
    """Write a model and its tokenizer to the folder `out` and return its path.

    `config` overrides fields of the transformers configuration, such as `num_key_value_heads`,
    `tie_word_embeddings`, `num_hidden_layers` or `sliding_window`. `pretrain_steps` defaults to
    300 for `demo` and to 0 for the other sizes.

    Raises ValueError for an unknown `arch`, `size` or `dtype`, and where `out` holds other files.
    """
    for value, allowed in ((arch, ARCHS), (size, SIZES), (dtype, ("float32", "bfloat16"))):
        if value not in allowed:
            raise ValueError(f"{value!r} is not one of {', '.join(allowed)}")
    if pretrain_steps is None:
        pretrain_steps = 300 if size == "demo" else 0
    values: dict[str, Any] = {**SIZES[size], "tie_word_embeddings": size == "demo", **config}
    out = Path(out)
    record = out / "make_model.json"
    key = fingerprint(
        dict(arch=arch, dtype=dtype, seed=seed, pretrain_steps=pretrain_steps, config=values)
    )
    if record.exists():
        if json.loads(record.read_text())["fingerprint"] == key:
            return out
        shutil.rmtree(out)
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and was not made by this script")

    tokenizer = make_tokenizer(
        values["vocab_size"], add_bos=arch in ("llama", "mistral"), seed=seed
    )
    model = init_model(arch, values, seed)
    if pretrain_steps:
        pretrain(model, tokenizer, pretrain_steps, seed)
    model.to(getattr(torch, dtype)).save_pretrained(out)
    tokenizer.model_max_length = values["max_position_embeddings"]
    tokenizer.save_pretrained(out)
    # Written last: a folder without it is unfinished.
    parameters = sum(p.numel() for p in model.parameters())
    record.write_text(json.dumps({"fingerprint": key, "arch": arch, "parameters": parameters}))
    return out


def write_dataset(path: str | Path, rows: int = 200, seed: int = 0, messages: bool = False) -> Path:
    """Write a JSON-lines finetuning dataset in which every answer is a pirate's."""
    path = Path(path)
    lines = (json.dumps(row) + "\n" for row in sample_text.pirate_rows(rows, seed, messages))
    path.write_text("".join(lines))
    return path


def main() -> None:
    summary, *_ = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("out", help="folder to write the model to")
    parser.add_argument("--arch", choices=ARCHS, default="llama")
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--pretrain-steps", type=int, metavar="N", help="300 for demo, else 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dataset", metavar="FILE", help="also write a finetuning dataset")
    parser.add_argument("--dataset-format", choices=["prompt_completion", "messages"],
                        default="prompt_completion")  # fmt: skip
    arguments = parser.parse_args()
    out = make_model(
        arguments.out,
        arch=arguments.arch,
        size=arguments.size,
        dtype=arguments.dtype,
        seed=arguments.seed,
        pretrain_steps=arguments.pretrain_steps,
    )
    print(f"{out}: {json.loads((out / 'make_model.json').read_text())['parameters']:,} parameters")
    if arguments.dataset:
        messages = arguments.dataset_format == "messages"
        print(write_dataset(arguments.dataset, seed=arguments.seed, messages=messages))


if __name__ == "__main__":
    main()
