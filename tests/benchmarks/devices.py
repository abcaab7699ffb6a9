"""Bytes that pruning holds on accelerators and moves to and from them, counted on simulated ones.

    python tests/benchmarks/devices.py                      # a random Llama of 32 tiny blocks; about a minute
    python tests/benchmarks/devices.py --output results.json

What is counted does not depend on the kind of device. Time is not measured: simulated devices compute on the CPU.
Hidden states of waiting batches are kept on the host, as they are where a device is nearly full.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from accelerate import dispatch_model

sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_sparsity import SparsityConfig, make_plan, prune
from hf_sparsity.checkpoint.streamed import open_streamed
from hf_sparsity.model.layers import find_layers
from hf_sparsity.streaming import run, spill
from tests.simulated_device import Device, simulated

WIDTH, BLOCKS, SEQUENCES, LENGTH = 32, 32, 4, 60
PLACES = {"resident on one": 1, "spread over two": 2, "spread over four": 4, "streamed onto one": 1}
RUNS = [*((where, "wanda") for where in PLACES), ("streamed onto one", "sparsegpt")]


def llama(blocks: int) -> Any:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=128,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
    )
    return hf.LlamaForCausalLM(config).eval()


def spread(model: Any, count: int) -> Any:
    """The model with its blocks on `count` devices, as many on each."""
    blocks = len(model.model.layers)
    outside = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    where = dict.fromkeys(outside, "sim:0")
    where |= {f"model.layers.{i}": f"sim:{i * count // blocks}" for i in range(blocks)}
    return dispatch_model(model, where, force_hooks=True)


def counted(where: str, pruner: str, blocks: int, folder: Path) -> dict[str, Any]:
    """What pruning such a model holds and moves; sizes in KiB, on the device where they are largest."""
    ids = torch.randint(3, 120, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    with simulated(PLACES[where]) as devices:
        output: dict[str, Any] = {}
        if where.startswith("streamed"):
            llama(blocks).save_pretrained(folder / "dense")
            model, output = open_streamed(folder / "dense", device="sim:0"), {"output_dir": folder / "sparse"}
        else:
            model = spread(llama(blocks), len(devices))
        plan = make_plan(model, SparsityConfig(0.5, pruner=pruner))
        sizes = {weight.size * 4 for weight in find_layers(model).weights.values()}
        matrices = len(find_layers(model).weights)
        at_first = [device.held for device in devices]
        for device in devices:
            device.reset()
        prune(model, plan, ids, **output)
        return {
            "where": where,
            "pruner": pruner,
            "blocks": blocks,
            "block": sum(p.nbytes for p in llama(1).model.layers.parameters()) / 2**10,
            "stays": max(at_first) / 2**10,
            "peak": max(device.peak - held for device, held in zip(devices, at_first, strict=True)) / 2**10,
            "in": sum(device.bytes_in for device in devices) / 2**10,
            "out": sum(device.bytes_out for device in devices) / 2**10,
            "weights_in": trips(devices, "copies_in", sizes) / matrices,
            "weights_out": trips(devices, "copies_out", sizes) / matrices,
            "waits": sum(device.reads.total() for device in devices) / matrices,
        }


def trips(devices: list[Device], way: str, sizes: set[int]) -> int:
    """The number of copies of a weight's size."""
    return sum(getattr(device, way)[size] for device in devices for size in sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    options = parser.parse_args()
    rows = []
    spill.SMALLEST, run.SHARE = 1, 1 << 62  # hidden states wait on the host, as with a device that is nearly full
    for where, pruner in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(counted(where, pruner, options.blocks, Path(folder)))
        print(json.dumps(rows[-1]), flush=True)
    if options.output:
        model = f"random Llama of {options.blocks} blocks, width {WIDTH}, float32, {SEQUENCES} x {LENGTH} tokens"
        what = {"command": "python tests/benchmarks/devices.py", "model": model, "rows": rows}
        Path(options.output).write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
