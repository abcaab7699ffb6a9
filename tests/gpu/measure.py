"""Figures of an accelerator, for the day one is there: prints a JSON of seconds, bytes, errors and shares of the floor.

    python tests/gpu/measure.py                            # 8B shape, 128 x 2048 tokens, on cuda; under 10 minutes
    python tests/gpu/measure.py --blocks 8 --sequences 32  # less
    python -m pytest -m gpu tests                          # the tests that need one

The floor of a run is the time of its products at the measured rate of products, plus that of the weights that travel at
the measured rate of copies. Each part that fails is reported with its error, and the others are measured all the same.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers as hf

sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_sparsity import SparsityCallback, SparsityConfig, make_plan, open_streamed, prune
from hf_sparsity.core.stats import GRAM, InputStats
from hf_sparsity.distributed import Processes
from hf_sparsity.model.layers import find_layers


@dataclass(frozen=True)
class Size:
    """The shape of the random model, and the tokens to prune it with."""

    width: int = 4096
    feedforward: int = 14336
    blocks: int = 32
    heads: int = 32
    vocabulary: int = 128256
    sequences: int = 128
    length: int = 2048

    def model(self) -> Any:
        config = hf.LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.feedforward,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=max(1, self.heads // 4),
            max_position_embeddings=self.length,
        )
        return hf.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()

    def ids(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(3, self.vocabulary - 1, (self.sequences, self.length), generator=generator)


class Clock:
    """Seconds of work on a device, all of it done."""

    def __init__(self, device: torch.device):
        self.kind = torch.get_device_module(device)

    def __call__(self, work: Callable[[], Any], repeats: int = 1) -> float:
        self.kind.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        self.kind.synchronize()
        return (time.perf_counter() - start) / repeats


def rates(device: torch.device, side: int) -> dict[str, float]:
    """Operations of a bf16 product, and bytes of a copy either way, in a second."""
    clock = Clock(device)
    matrix = torch.ones(side, side, dtype=torch.bfloat16, device=device)
    host = torch.ones(side, side, dtype=torch.bfloat16)
    clock(lambda: matrix @ matrix)
    return {
        "products": 2 * side**3 / clock(lambda: matrix @ matrix, 10),
        "to_device": host.nbytes / clock(lambda: host.to(device), 10),
        "to_host": host.nbytes / clock(lambda: matrix.to("cpu"), 10),
    }


def statistics(device: torch.device, width: int, tokens: int) -> float:
    """Largest error of a Gram matrix of bf16 inputs, relative to its largest entry, against float64 on the host."""
    inputs = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)).bfloat16()
    stats = InputStats(frozenset({GRAM}))
    stats.add(inputs.to(device), sequences=1)
    exact = inputs.double().T @ inputs.double()
    assert stats.gram is not None
    return float((stats.gram.cpu().double() - exact).abs().max() / exact.abs().max())


def pruned(size: Size, device: torch.device, pruner: str, streamed: bool, rate: dict[str, float], folder: Path) -> Any:
    """Seconds of planning and pruning, peaks of memory, and the share of the time that the floor is."""
    clock, kind = Clock(device), torch.get_device_module(device)
    if streamed:
        model, output = open_streamed(folder / "dense", device=device), {"output_dir": folder / f"{pruner} streamed"}
    else:
        model, output = hf.AutoModelForCausalLM.from_pretrained(folder / "dense", device_map={"": str(device)}), {}
    weights = sum(weight.size for weight in find_layers(model).weights.values())
    if hasattr(kind, "reset_peak_memory_stats"):
        kind.reset_peak_memory_stats(device)
    plan = make_plan(model, SparsityConfig(0.5, pruner=pruner))
    seconds = clock(lambda: prune(model, plan, size.ids(), **output))
    floor = 2 * 2 * weights * size.sequences * size.length / rate["products"]  # two forward passes
    floor += (2 * 2 * weights / rate["to_device"] + 2 * weights / rate["to_host"]) * streamed
    peak = kind.max_memory_allocated(device) if hasattr(kind, "max_memory_allocated") else None
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "floor": floor / seconds, "device_bytes": peak, "host_bytes_so_far": host}


def one_process(device: torch.device) -> str:
    """The backend by which a process of a launch sums a tensor of the device."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        try:
            mine = torch.ones(4, device=device)
            assert Processes(0, 2).sum(mine).tolist() == [1.0] * 4  # with all it takes; one process is the sum
        finally:
            dist.destroy_process_group()
    return backend


def trained(device: torch.device, folder: Path) -> float:
    """Sparsity after two steps of training with the zeros held, in bf16 on cuda."""
    small = Size(64, 96, 2, 4, 128, 4, 16)
    model = small.model().float().to(device)
    prune(model, make_plan(model, {"sparsity": 0.5, "pruner": "magnitude"}))
    data = [{"input_ids": row, "labels": row} for row in small.ids()]
    options = {"max_steps": 2, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    options["bf16"] = device.type == "cuda"  # a simulated device is not asked
    arguments = hf.TrainingArguments(str(folder / "trainer"), dataloader_pin_memory=False, **options)
    callback = SparsityCallback()
    hf.Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    return callback.sparsity


def measure(
    size: Size, device: torch.device, pruners: tuple[str, ...] = ("wanda", "sparsegpt", "alps")
) -> dict[str, Any]:
    """All figures; of a part that failed, its error."""
    figures: dict[str, Any] = {"device": str(device), "torch": torch.__version__, "size": vars(size)}

    def part(name: str, work: Callable[[], Any]) -> Any:
        try:
            figures[name] = work()
        except Exception as error:
            figures[name] = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        print(json.dumps({name: figures[name]}), file=sys.stderr, flush=True)
        return figures[name]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size.model().save_pretrained(folder / "dense")
        rate = part("rates", lambda: rates(device, size.width))
        part("statistics", lambda: statistics(device, size.width, size.length))
        for pruner in pruners:
            for streamed in (False, True):
                where = "streamed" if streamed else "resident"
                part(f"{pruner} {where}", lambda p=pruner, s=streamed: pruned(size, device, p, s, rate, folder))
        part("one process", lambda: one_process(device))
        part("training", lambda: trained(device, folder))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    for name in ("blocks", "sequences", "length"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Size, name))
    options = parser.parse_args()
    size = Size(blocks=options.blocks, sequences=options.sequences, length=options.length)
    print(json.dumps(measure(size, torch.device(options.device)), indent=1))


if __name__ == "__main__":
    main()
