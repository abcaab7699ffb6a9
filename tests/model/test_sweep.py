"""Every causal-LM architecture of the installed transformers that can be shrunk: statistics equal a plain forward's."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_sparsity import SparsityConfig, make_plan, prune
from hf_sparsity.calibration.batches import prepare_batches
from hf_sparsity.checkpoint.streamed import open_streamed
from hf_sparsity.core.stats import GRAM
from hf_sparsity.model.layers import find_layers
from hf_sparsity.streaming.stream import stream_blocks
from tests.model.shrink import causal_configs, shrunk
from tests.streaming.moments import plain_moments

KNOWN = 139  # how many could be shrunk with the transformers that the constraints name


def check(model):
    """(layers, layers that were fed) of a model whose statistics are right; asserts otherwise."""
    ids = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(0))
    batches = prepare_batches(model, ids)
    layout = find_layers(model)
    oracle = plain_moments(model, batches)
    fed = 0
    for block in stream_blocks(model, layout, batches, frozenset({GRAM}), rewrites=False):
        for name, layer in block.layers.items():
            weight = layout.weights[name]
            expected = oracle.moments.get((weight.parameter, weight.expert))
            if layer.stats is None:
                assert expected is None, f"{name} was used, but not seen"
                continue
            assert expected is not None, f"{name} was seen, but not used"
            torch.testing.assert_close(layer.stats.gram.double(), expected, rtol=1e-4, atol=1e-4)
            fed += 1
    return len(layout.weights), fed


@pytest.mark.slow
def test_every_causal_architecture():
    passed, failed, unshrunk = [], {}, []
    for name, config_class in causal_configs().items():
        print(name, end=" ", flush=True)
        model = shrunk(config_class)
        if model is None:
            unshrunk.append(name)
            continue
        try:
            _layers, fed = check(model)
            assert fed, "no layer was fed"
            passed.append(name)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
    print(f"{len(passed)} exact, {len(unshrunk)} could not be shrunk: {', '.join(unshrunk)}")
    assert not failed, "\n".join(f"{k}: {v}" for k, v in failed.items())
    assert len(passed) >= KNOWN


@pytest.mark.slow
def test_every_causal_architecture_streamed(tmp_path):
    """Read block by block, pruned and written under the checkpoint's own names: the weights of pruning in memory."""
    passed, failed = [], {}
    ids = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(0))
    for name, config_class in causal_configs().items():
        print(name, end=" ", flush=True)
        model = shrunk(config_class)
        if model is None:
            continue
        try:
            source, output = tmp_path / name, tmp_path / f"{name}_sparse"
            model.save_pretrained(source)
            model = AutoModelForCausalLM.from_pretrained(source)
            streamed = open_streamed(source)
            plan = make_plan(model, SparsityConfig(0.5))
            prune(model, plan, ids)
            prune(streamed, plan, ids, output_dir=output)
            loaded, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"], info
            expected = model.state_dict()
            assert [k for k, v in loaded.state_dict().items() if not torch.equal(v, expected[k])] == []
            passed.append(name)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
    assert not failed, "\n".join(f"{k}: {v}" for k, v in failed.items())
    assert len(passed) >= KNOWN
