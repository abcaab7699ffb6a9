"""The authors' values for spectra and their exponents, and the weights that they are of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial

from safetensors.torch import load_file
from torch import Tensor

from hf_sparsity.core.spectra import sliding
from tests.conftest import GOLDENS

LLAMA = GOLDENS / "llama-tiny"
ALPHA = json.loads((LLAMA / "alloc/alphapruning_70.json").read_text())
FARMS = json.loads((LLAMA / "alloc/farms.json").read_text())["runs"]["scripts_2000_Q1_ops15"]
SCRIPT = partial(sliding, height=2000, ratio=1.0, steps=15)


def weights(names: Sequence[str]) -> list[Tensor]:
    stored = load_file(GOLDENS / "models/llama-tiny/model.safetensors")
    return [stored[f"{name}.weight"] for name in names]
