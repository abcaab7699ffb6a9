"""What several files measure: the embedded model's tokenizer, and folders of a dense and a sparse model."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from hf_sparsity import demo, save_sparse
from tests.evaluation.models import small, sparse


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.PATH)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """(a sparse model's folder, the dense one's)."""
    path = tmp_path_factory.mktemp("folders")
    save_sparse(sparse(), path / "sparse", tokenizer=tokenizer)
    small().save_pretrained(path / "dense")
    tokenizer.save_pretrained(path / "dense")
    return path / "sparse", path / "dense"
