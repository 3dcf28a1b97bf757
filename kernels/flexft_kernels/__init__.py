"""The backward ops of vllm-flexft, one file an op, as plain functions without autograd.

An op in plain torch is the definition; `<op>_triton.py` beside it has the same functions for GPUs;
`ops.py` chooses by device.

Shape legend: `T` tokens, `W` tokens of a window, `S` keys of a sequence, `N` loss terms, `D` hidden
size, `H` query heads, `K` key-value heads, `G` = H / K, `E` head dim, `F` MLP width, `I`, `O` input
and output width of a linear, `R` LoRA rank, `V` vocabulary.
"""
