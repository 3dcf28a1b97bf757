"""Keys of other tools: the name we use for the same thing, or why there is none.

Sources: transformers TrainingArguments, TRL SFTConfig and ScriptArguments, PEFT LoraConfig,
LLaMA-Factory, axolotl and OpenAI's fine-tuning hyperparameters. Keys that we have under the same
name are not listed, nor those that a section accepts in place of ours.
"""

from __future__ import annotations

from typing import Any

# Asking for what happens anyway: the key may stay in a pasted config with one of these values.
NO_EFFECT_VALUES: dict[str, tuple[Any, ...]] = {
    "packing": (False,),
    "bf16": (True,),
    "fp16": (False, None),
    "lora_dropout": (0.0,),
    "bias": ("none",),
    "task_type": ("CAUSAL_LM",),
    "use_dora": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "load_in_4bit": (False,),
    "load_in_8bit": (False,),
}


def _use(ours: str) -> str:
    return f"use {ours}"


_RENAMED: dict[str, tuple[str, ...]] = {
    "name": ("adapter_name", "model_name", "run_name", "suffix", "served_model_name"),
    "output_dir": ("save_dir", "output_path", "out_dir"),
    "report_to: [wandb]": ("use_wandb", "wandb_project", "wandb"),
    "dataset.path": (
        "dataset_name",
        "dataset_path",
        "data_path",
        "data_file",
        "train_file",
        "training_file",
        "train_dataset",
        "dataset_dir",
        "datasets",
        "data",
    ),
    "dataset.format": ("formatting", "dataset_type", "data_format", "type"),
    "dataset.columns": ("column_mapping", "field_messages", "messages_field"),
    "dataset.columns.prompt": ("prompt_field", "field_instruction"),
    "dataset.columns.completion": ("completion_field", "response_field", "field_output"),
    "dataset.max_length": (
        "cutoff_len",
        "max_seq_length",
        "max_seq_len",
        "sequence_len",
        "seq_length",
        "model_max_length",
        "block_size",
        "max_tokens",
    ),
    "dataset.overlong": ("truncation", "truncation_mode", "truncation_strategy"),
    "dataset.completion_only_loss": (
        "train_on_prompt",
        "train_on_input",
        "train_on_inputs",
        "train_on_responses_only",
        "mask_prompt",
    ),
    "validation.path": (
        "eval_dataset",
        "eval_file",
        "validation_file",
        "validation_dataset",
        "test_datasets",
        "val_size",
        "val_set_size",
    ),
    "validation.every_steps": ("eval_steps", "eval_interval", "evals_per_epoch", "eval_every"),
    "peft.r": ("lora_r", "lora_rank", "rank", "max_lora_rank", "lora_dim"),
    "peft.lora_alpha": ("alpha", "lora_scale", "lora_scaling"),
    "peft.target_modules": (
        "lora_target",
        "lora_target_modules",
        "lora_modules",
        "lora_target_linear",
    ),
    "peft.layers_to_transform": ("peft_layers_to_transform", "num_layers", "lora_layers"),
    "peft.use_rslora": ("rslora", "peft_use_rslora"),
    "peft.init_adapter": (
        "adapter_name_or_path",
        "lora_model_dir",
        "lora_path",
        "adapter_path",
        "resume_adapter",
    ),
    "peft.peft_type": ("adapter", "finetuning_type", "method", "use_peft"),
    "training.num_train_epochs": ("num_epochs", "epochs", "n_epochs", "max_epochs"),
    "training.max_steps": ("total_steps", "num_steps", "iters", "max_iters", "num_training_steps"),
    "training.train_batch_size": (
        "batch_size",
        "micro_batch_size",
        "global_batch_size",
        "per_gpu_train_batch_size",
    ),
    "training.learning_rate": ("lr", "learning_rate_multiplier", "peak_lr"),
    "training.lr_scheduler_type": ("lr_scheduler", "scheduler", "lr_schedule"),
    "training.warmup_ratio": ("warmup", "warmup_proportion", "warmup_fraction"),
    "training.warmup_steps": ("num_warmup_steps", "lr_warmup_steps"),
    "training.optim": ("optimizer", "optimizer_type"),
    "training.adam_beta1 and training.adam_beta2": ("betas", "adam_betas"),
    "training.adam_beta1": ("beta1",),
    "training.adam_beta2": ("beta2",),
    "training.adam_epsilon": ("eps", "epsilon", "adam_eps"),
    "training.max_grad_norm": ("gradient_clipping", "grad_clip", "clip_grad_norm"),
    "training.seed": ("data_seed", "random_seed", "random_state"),
    "training.save_steps": ("save_interval", "saves_per_epoch", "save_every", "checkpoint_every"),
    "training.save_total_limit": ("max_checkpoints", "keep_checkpoints"),
    "training.early_stopping_patience": ("early_stopping", "patience"),
    "slo.tpot_ms": ("tpot", "slo_tpot", "tpot_slo", "itl_ms"),
    "slo.ttft_ms": ("ttft", "slo_ttft", "ttft_slo"),
}

_MODEL = "the base model is the one being served: name it on the server's command line"
_QUANTIZATION = "the base weights are the server's: give vllm serve --quantization"
_DTYPE = "activations have the server's --dtype (bf16: true may stay); LoRA masters are fp32"
_PARALLEL = "parallelism is the server's: give vllm serve --tensor-parallel-size"
_MEMORY = "what is stored and what is recomputed follows from --co-finetune-config.memory_gib"
_LOGGING = "every optimizer step is logged to output_dir/metrics.jsonl; leave it out"
_TEMPLATE = "the model's own chat template is used (vllm serve --chat-template changes it)"
_LOADER = "the engine reads and tokenises ahead by itself; leave it out"
_HUB = "the adapter is written to output_dir; push it from there"
_KERNELS = "kernels are chosen by the engine; leave it out"
_PACKING = (
    "not supported and not needed: sequences share a batch without padding (packing: false may "
    "stay)"
)
_LORA_ONLY = "not supported: plain LoRA on the linears of the decoder layers is trained"

_UNSUPPORTED: dict[str, tuple[str, ...]] = {
    "only 0.0 is supported: dropout would make recomputed chunks differ from the first forward "
    "pass; to regularise use training.weight_decay": ("lora_dropout",),
    f"{_LORA_ONLY}; only `none` is accepted": ("bias", "lora_bias"),
    f"{_LORA_ONLY}; vLLM serves no DoRA (use_dora: false may stay)": ("use_dora", "dora"),
    f"{_LORA_ONLY}; A starts kaiming-uniform and B at 0, or from peft.init_adapter": (
        "init_lora_weights",
        "loftq_config",
        "pissa_init",
        "eva_config",
        "corda_config",
    ),
    _LORA_ONLY: (
        "modules_to_save",
        "lora_modules_to_save",
        "rank_pattern",
        "alpha_pattern",
        "layers_pattern",
        "exclude_modules",
        "target_parameters",
        "trainable_token_indices",
        "fan_in_fan_out",
        "task_type",
        "loraplus_lr_ratio",
        "loraplus_lr_embedding",
        "lisa_n_layers",
        "use_galore",
        "layer_replication",
    ),
    _MODEL: (
        "model",
        "base_model",
        "base_model_name_or_path",
        "model_name_or_path",
        "model_revision",
        "trust_remote_code",
        "tokenizer",
    ),
    _QUANTIZATION: (
        "load_in_4bit",
        "load_in_8bit",
        "quantization",
        "quantization_bit",
        "quantization_config",
        "bnb_4bit_compute_dtype",
        "bnb_4bit_quant_type",
    ),
    _DTYPE: ("bf16", "fp16", "tf32", "torch_dtype", "dtype", "half_precision_backend", "bfloat16"),
    _PARALLEL: (
        "deepspeed",
        "fsdp",
        "fsdp_config",
        "ddp_timeout",
        "ddp_find_unused_parameters",
        "world_size",
        "tensor_parallel_size",
    ),
    _MEMORY: (
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "use_reentrant_gc",
        "activation_offloading",
        "activation_checkpointing",
    ),
    _LOGGING: (
        "logging_steps",
        "logging_strategy",
        "logging_dir",
        "logging_first_step",
        "plot_loss",
        "log_level",
    ),
    _TEMPLATE: ("chat_template", "chat_template_path", "template", "chat_template_jinja"),
    _LOADER: (
        "dataloader_num_workers",
        "dataloader_drop_last",
        "dataset_num_proc",
        "preprocessing_num_workers",
        "dataset_prepared_path",
        "overwrite_cache",
        "remove_unused_columns",
        "group_by_length",
        "streaming",
        "pad_to_sequence_len",
    ),
    "cut the file itself, as with head -n": ("max_samples", "max_train_samples"),
    _HUB: ("push_to_hub", "hub_model_id", "hub_token", "hub_strategy"),
    _KERNELS: (
        "attn_implementation",
        "flash_attn",
        "flash_attention",
        "torch_compile",
        "use_liger_kernel",
        "liger_kernel",
        "use_unsloth",
        "use_cpu",
        "no_cuda",
    ),
    _PACKING: ("packing", "sample_packing", "eval_packing", "packing_strategy", "neat_packing"),
    "a job goes on from its last checkpoint by itself; leave it out": (
        "resume_from_checkpoint",
        "auto_resume_from_checkpoints",
        "overwrite_output_dir",
    ),
    "a checkpoint is written every training.save_steps; leave it out": (
        "save_strategy",
        "save_only_model",
        "save_safetensors",
    ),
    "validation runs every validation.every_steps; leave it out": (
        "eval_strategy",
        "evaluation_strategy",
        "do_train",
        "do_eval",
        "per_device_eval_batch_size",
        "eval_batch_size",
    ),
    "the last adapter is the final one, every checkpoint is served as name@step-N; leave it out": (
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
    ),
    "not supported: the loss is the mean cross-entropy over supervised tokens": (
        "neftune_noise_alpha",
        "label_smoothing_factor",
        "loss_type",
        "use_dft_loss",
        "stage",
        "rl",
        "beta",
        "loss_scale",
    ),
    "not supported: lr_scheduler_type, warmup and learning_rate say all": (
        "lr_scheduler_kwargs",
        "cosine_min_lr_ratio",
        "min_lr",
        "lr_decay_steps",
        "optim_args",
    ),
}

# key -> what to do about it
FOREIGN_KEYS: dict[str, str] = {
    **{theirs: _use(ours) for ours, keys in _RENAMED.items() for theirs in keys},
    **{theirs: why for why, keys in _UNSUPPORTED.items() for theirs in keys},
}
