"""A small model with the embedded model's vocabulary, dense and sparse, and documents for it."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparsity import SparsityConfig, make_plan, prune


def small(seed: int = 1) -> LlamaForCausalLM:
    """A random model for the embedded tokenizer."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=3072, max_position_embeddings=128, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2)
    return model


def sparse(seed: int = 1) -> LlamaForCausalLM:
    model = small(seed)
    prune(model, make_plan(model, SparsityConfig(sparsity=0.5, pruner="magnitude")))
    return model


DOCUMENTS = [f"class Thing{i}:\n    '''{'x + y ' * (20 + 13 * i)}'''\n" for i in range(10)]
