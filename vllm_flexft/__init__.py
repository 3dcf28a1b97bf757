"""Co-serving: finetune LoRA adapters inside a serving vLLM engine."""

__version__ = "0.1.0"
