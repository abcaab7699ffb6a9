"""What every process that is forked for a test has imported: see `tools.FORKED`."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers as hf

import hf_sparsity

torch.set_num_threads(1)
for name in hf_sparsity.__all__:  # all modules of the package
    getattr(hf_sparsity, name)
for name in ("AutoModelForCausalLM", "LlamaForCausalLM", "MixtralForCausalLM", "AutoTokenizer", "Trainer"):
    getattr(hf, name)
