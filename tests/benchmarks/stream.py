"""Peak memory and time of streaming a random Llama of 8B shape, at several depths.

    python tests/benchmarks/stream.py --work DIR                                  # Wanda, 8, 16 and 32 blocks
    python tests/benchmarks/stream.py --work DIR --pruner sparsegpt --blocks 4

DIR needs about 35 GiB for 32 blocks (the model and the result, removed afterwards). Width 4096, feed-forward 14336,
32 heads and 8 key/value heads, vocabulary 128256, bf16: 16 GB with 32 blocks. Each depth is pruned by a process of its
own with 4 x 128 tokens; the peak is the highest resident memory that the kernel reports for it (Linux: `VmHWM`, which
counts pages of mapped files too), next to what `estimate_memory` says and to the sum of its parts: embeddings and head,
one block, its statistics, hidden states.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make(folder: Path, blocks: int) -> None:
    """Writes the model shard by shard, a block each."""
    config = LlamaConfig(**SHAPE, num_hidden_layers=blocks, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    width, inner, kv = 4096, 14336, 1024
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    where = {}

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{number:05d}-of-{blocks + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, file))

    for i in range(blocks):
        sizes = {"q": (width, width), "k": (kv, width), "v": (kv, width), "o": (width, width)}
        block = {f"self_attn.{name}_proj.weight": random(*size) for name, size in sizes.items()}
        block |= {f"mlp.{name}_proj.weight": random(inner, width) for name in ("gate", "up")}
        block["mlp.down_proj.weight"] = random(width, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            block[f"{name}.weight"] = torch.ones(width, dtype=torch.bfloat16)
        write(i + 1, {f"model.layers.{i}.{name}": tensor for name, tensor in block.items()})
    outside = {"model.embed_tokens.weight": random(128256, width), "lm_head.weight": random(128256, width)}
    write(blocks + 1, outside | {"model.norm.weight": torch.ones(width, dtype=torch.bfloat16)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def one(source: Path, output: Path, pruner: str, sequences: int, length: int) -> None:
    """Prunes, and prints one line of JSON."""
    from hf_sparsity import SparsityConfig, make_plan, prune
    from hf_sparsity.calibration.batches import prepare_batches
    from hf_sparsity.checkpoint.streamed import open_streamed
    from hf_sparsity.model.layers import find_layers
    from hf_sparsity.streaming.memory import estimate_memory

    imports = _status("VmHWM")
    ids = torch.randint(0, 128256, (sequences, length), generator=torch.Generator().manual_seed(1))
    start = time.perf_counter()
    model = open_streamed(source)
    config = SparsityConfig(0.5, pruner=pruner)
    layout = find_layers(model)
    estimate = estimate_memory(model, layout, prepare_batches(model, ids), config.pruner.needs, journal=True)
    plan = make_plan(model, config)
    report = prune(model, plan, ids, output_dir=output)
    seconds = time.perf_counter() - start
    block = sum(p.numel() * p.element_size() for p in layout.blocks[0].module.parameters())
    outside = sum(p.numel() * p.element_size() for p in model.parameters() if p.device.type != "meta")
    widths = [4096, 4096, 4096, 14336]  # inputs of q/k/v, o, gate/up, down
    statistics = sum(4 * w * w if pruner == "sparsegpt" else 4 * w for w in widths)
    parts = outside + block + statistics + sequences * length * 4096 * 2
    told = {"peak": _status("VmHWM"), "imports": imports, "estimate": estimate.peak, "parts": parts}
    print(json.dumps(told | {"seconds": seconds, "sparsity": report.sparsity}))


def _status(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models")
    parser.add_argument("--pruner", default="wanda", choices=["magnitude", "wanda", "sparsegpt"])
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--one", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(*options.one, options.pruner, options.sequences, options.length)
        return
    for blocks in options.blocks:
        source, output = options.work / f"random_{blocks}", options.work / f"sparse_{blocks}"
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(output, ignore_errors=True)
        try:
            make(source, blocks)
            size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
            given = [f"--pruner={options.pruner}", f"--sequences={options.sequences}", f"--length={options.length}"]
            command = [sys.executable, __file__, "--work", str(options.work), "--one", str(source), str(output), *given]
            told = json.loads(
                subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
            )
            gib = {key: told[key] / 2**30 for key in ("peak", "imports", "estimate", "parts")}
            print(
                f"{options.pruner:10s} {blocks:3d} blocks, {size / 1e9:5.1f} GB on disk: peak {gib['peak']:.2f} GiB, of which imports "
                f"{gib['imports']:.2f}; estimated {gib['estimate']:.2f}; embeddings and head + one block + statistics + hidden "
                f"states {gib['parts']:.2f} ({gib['peak'] / gib['parts']:.2f} times); {told['seconds']:.0f} s; sparsity {told['sparsity']:.4f}",
                flush=True,
            )
        finally:
            shutil.rmtree(source, ignore_errors=True)
            shutil.rmtree(output, ignore_errors=True)


if __name__ == "__main__":
    main()
