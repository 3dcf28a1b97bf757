"""From a dataset file to token sequences with targets, in an order that a resume continues.

files     rows of a .jsonl, .json, .csv or .parquet file
formats   a row of any format -> TextExample, PromptCompletionExample or ChatExample
chat      a ChatExample -> text and the character spans the assistant wrote
tokenize  text and spans -> token ids and which of them are targets
dataset   all of it, kept in flat arrays
preparer  a process that does all of it, away from the engine's
order     which rows an optimizer step trains on
"""

from vllm_flexft.data.dataset import DataReport, TrainingData, TrainingSequence
from vllm_flexft.data.files import DataError
from vllm_flexft.data.order import BatchOrder

__all__ = ["BatchOrder", "DataError", "DataReport", "TrainingData", "TrainingSequence"]
