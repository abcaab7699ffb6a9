"""Speed of a whole pruning run against the authors' code, on a random Llama (a few minutes).

    git clone https://github.com/locuslab/wanda DIR
    python tests/benchmarks/prune.py --authors DIR                      # Wanda
    python tests/benchmarks/prune.py --authors DIR --pruner sparsegpt   # the SparseGPT in the same repository

Both sides prune the same model on the same 32 x 512 tokens, in turn, in one process: calibration
forward, statistics, masks or solving, forward again. Prints seconds (medians), the ratio, and how many
mask bits differ. Only what their code needs to run today is added: the calibration loader returns our
ids, and rotary tables are handed to the decoder layers, which old transformers computed inside.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import statistics
import sys
import time
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparsity import SparsityConfig, make_plan, prune


def build(width: int, blocks: int, length: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        max_position_embeddings=length,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


torch.cuda.synchronize = lambda *_: None  # their solver calls it on CPU as well


def authors(module: object, pruner: str, model: LlamaForCausalLM, ids: torch.Tensor, sparsity: float) -> None:
    batches = [(row[None], None) for row in ids]
    module.get_loaders = lambda *_, **__: (batches, None)
    model.seqlen, model.hf_device_map = ids.shape[1], {}
    positions = torch.arange(ids.shape[1])[None]
    rotary = model.model.rotary_emb(torch.zeros(1, 1), positions)
    for layer in model.model.layers:
        forward = layer.forward

        def with_rotary(*args, _forward=forward, **kwargs):
            output = _forward(*args, **{"position_embeddings": rotary} | kwargs)
            return (output,)  # their [0] expects the tuple that layers used to return

        layer.forward = with_rotary
    arguments = SimpleNamespace(nsamples=len(ids), seed=0, sparsity_ratio=sparsity, use_variant=False)
    # Their buffer holds 128 samples whatever is asked for; that is memory, not time.
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), torch.no_grad():
        getattr(module, f"prune_{pruner}")(arguments, model, None, torch.device("cpu"))


def floor(model: LlamaForCausalLM, ids: torch.Tensor, pruner: str) -> float:
    """Seconds that no implementation of the method saves: products alone, at the rate measured here, masks free.

    The statistics pass needs all but each block's last product, the second pass all blocks but the last;
    SparseGPT needs half of four Gram matrices a block (q/k/v share one, gate/up another).
    """
    layer, tokens = model.model.layers[0], ids.numel()
    start = time.perf_counter()
    with torch.no_grad():
        for row in ids:
            model.model(row[None])
    forward = time.perf_counter() - start
    a, b = torch.randn(ids.shape[1], 1024), torch.randn(1024, 2816)
    start = time.perf_counter()
    for _ in range(50):
        a @ b
    rate = 50 * 2 * a.numel() * b.shape[1] / (time.perf_counter() - start)
    blocks = len(model.model.layers)
    last = 2 * layer.mlp.down_proj.weight.numel() * tokens / rate * blocks
    seconds = 2 * forward - last - forward / blocks
    if pruner == "sparsegpt":
        widths = [layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.down_proj]
        seconds += sum(w.in_features**2 for w in widths) * tokens / rate * blocks
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--authors", required=True, help="checkout of locuslab/wanda")
    parser.add_argument("--pruner", default="wanda", choices=["wanda", "sparsegpt"])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sys.path.insert(0, options.authors)
    module = importlib.import_module("lib.prune")
    ids = torch.randint(0, 4096, (options.sequences, options.length), generator=torch.Generator().manual_seed(1))
    dense = build(options.width, options.blocks, options.length)
    config = SparsityConfig(options.sparsity, pruner=options.pruner)
    plan = make_plan(dense, config)

    def ours(model):
        prune(model, plan, ids)

    def theirs(model):
        authors(module, options.pruner, model, ids, options.sparsity)

    seconds = {"authors": [], "hf_sparsity": []}
    masks = {}
    for _ in range(options.repeats):
        for name, side in (("authors", theirs), ("hf_sparsity", ours)):
            model = build(options.width, options.blocks, options.length)
            start = time.perf_counter()
            side(model)
            seconds[name].append(time.perf_counter() - start)
            masks[name] = [model.get_submodule(layer).weight == 0 for layer in plan.layers]
            del model
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    different = sum(int((a != b).sum()) for a, b in zip(masks["authors"], masks["hf_sparsity"], strict=True))
    total = sum(mask.numel() for mask in masks["authors"])
    for name, values in seconds.items():
        print(f"{name:12s} median {medians[name]:7.2f} s   ({', '.join(f'{v:.2f}' for v in values)})")
    print(
        f"{options.pruner} {options.sparsity:g}, {options.threads} threads: {medians['authors'] / medians['hf_sparsity']:.2f} times as fast as the authors' code"
    )
    least = floor(dense, ids, options.pruner)
    print(f"floor {least:.2f} s (forward passes and Gram matrices): at most {medians['authors'] / least:.2f} times")
    print(f"mask bits that differ: {different} of {total}")


if __name__ == "__main__":
    main()
