"""The finetune job and the server's options: one schema for YAML, HTTP and Python.

>>> job = FinetuneJob.from_yaml("job.yaml")      # or FinetuneJob.from_mapping({...})
>>> job.training.learning_rate_at(step=0, total_steps=100)

Every door raises `JobError` with one line per mistake. Names and defaults follow TRL's SFTConfig,
transformers' TrainingArguments and PEFT's LoraConfig.
"""

from vllm_flexft.config.dataset import (
    DEFAULT_MAX_LENGTH,
    DatasetConfig,
    DatasetFormat,
    ValidationConfig,
)
from vllm_flexft.config.errors import JobError
from vllm_flexft.config.job import FinetuneJob, SLOConfig
from vllm_flexft.config.peft import LINEAR_MODULES, PeftConfig
from vllm_flexft.config.server import ActivationPolicy, ServerOptions
from vllm_flexft.config.training import TrainingConfig

__all__ = [
    "DEFAULT_MAX_LENGTH",
    "LINEAR_MODULES",
    "ActivationPolicy",
    "DatasetConfig",
    "DatasetFormat",
    "FinetuneJob",
    "JobError",
    "PeftConfig",
    "SLOConfig",
    "ServerOptions",
    "TrainingConfig",
    "ValidationConfig",
]
