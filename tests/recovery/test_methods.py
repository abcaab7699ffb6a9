"""The methods of recover as dataclasses, by name, and from today's keywords."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from hf_sparsity import BlockReconstruction, FullFineTuning, MaskedLora, Reconstruction, recover
from hf_sparsity.recovery.methods import METHODS, as_method


def test_a_name_with_keywords_is_the_dataclass_with_them():
    assert as_method("lora", {"rank": 8, "steps": 50}) == MaskedLora(rank=8, steps=50)
    assert as_method("full", {"training": None, "tokens": 999}) == FullFineTuning(tokens=999)
    blocks = BlockReconstruction(epochs=2)
    assert as_method("reconstruct", {"reconstruct": blocks, "batch": 4}) == Reconstruction(blocks=blocks, batch=4)
    assert as_method(blocks, {}) == Reconstruction(blocks=blocks)
    assert as_method(method := MaskedLora(hidden=0.5), {}) is method


def test_defaults_depend_on_the_method_and_the_model():
    lora, full, again = (METHODS[name]().resolved(length=128, width=192) for name in ("lora", "full", "reconstruct"))
    assert (lora.steps, full.steps, again.steps) == (200, 200, 16)
    assert lora.lr == pytest.approx(6e-3) and full.lr == pytest.approx(1e-3)
    assert MaskedLora(tokens=2000, batch=4).resolved(length=64, width=192).steps == 8
    assert Reconstruction(tokens=2000).resolved(length=64, width=192).steps == 4


def test_options_of_another_method_are_named(caplog):
    with caplog.at_level(logging.WARNING):
        assert as_method("full", {"rank": 8}) == FullFineTuning()
    assert "method='full' has no option rank" in caplog.text


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("magic", {}, ValueError, "one of lora, full, reconstruct"),
        (3, {}, ValueError, "MaskedLora"),
        (MaskedLora(), {"rank": 8}, ValueError, r"write MaskedLora\(rank="),
        ("lora", {"ranks": 8}, TypeError, "unexpected keyword argument 'ranks'"),
        ("lora", {"steps": 1, "tokens": 1}, ValueError, "steps or tokens"),
        ("lora", {"rank": 0}, ValueError, "rank=0"),
        ("full", {"tokens": -5}, ValueError, "tokens=-5"),
        ("full", {"lr": "fast"}, ValueError, "lr='fast'"),
        ("full", {"batch": 4, "accumulation": 3}, ValueError, "cannot be cut"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(method, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        recover(tmp_path / "no such folder", None, method, output_dir=tmp_path / "out", **options)


def test_the_command_reads_the_methods_without_torch():
    code = "import sys, hf_sparsity.recovery.methods; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
