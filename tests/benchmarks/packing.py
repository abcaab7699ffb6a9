"""Packed folders in one run: size against the formula, speed of packing, unpacking and loading against safetensors alone.

    python tests/benchmarks/packing.py              # a 0.25-billion-weight Llama in bf16; about three minutes
    python tests/benchmarks/packing.py --hidden 512 --threads 1
    python tests/benchmarks/packing.py --sparsity 0.7
    python tests/benchmarks/packing.py --torch      # without the compiled loops, as on CPUs that are not x86-64

Speeds are GB of *dense* weights a second, the best of `--repeat` times; ratios are medians over pairs measured one
right after the other. "Loaded" means every byte was read: transformers maps a dense file and reads nothing until
somebody looks. Cold: the files were dropped from the page cache before (Linux), so the disk is part of it; warm: they
were just read, and a dense model is the page cache itself, without a copy. "Owned": with a copy, as after `.to(...)` or
a step of training; a packed model is owned from the start. Memory that the process never used before costs as much as
what is done in it: the column `fresh` is a plain copy into such memory, page by page as it is written.

What a slower disk makes of it, as root on Linux (cgroup v1; 254:0 is the disk in `lsblk`):

    mkdir /sys/fs/cgroup/blkio/slow
    echo "254:0 500000000" > /sys/fs/cgroup/blkio/slow/blkio.throttle.read_bps_device
    echo $$ > /sys/fs/cgroup/blkio/slow/tasks
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from hf_sparsity import make_plan, prune
from hf_sparsity.checkpoint.bitmask import bits, codec
from hf_sparsity.checkpoint.save import save_sparse
from hf_sparsity.checkpoint.zeros import folder_bytes
from hf_sparsity.publish.layouts import pack, unpack

MATRIX = 4096  # rows and columns of the matrix that checkpoint/bitmask/codec.py is timed on


def best(job, repeat, before=None):
    """(seconds, CPU seconds of all threads) of the fastest of `repeat` runs."""
    times = []
    for _ in range(repeat):
        if before is not None:
            before()
        start, cpu = time.perf_counter(), time.process_time()
        job()
        times.append((time.perf_counter() - start, time.process_time() - cpu))
    return min(t for t, _ in times), min(t for _, t in times)


def touch(tensors):
    """Reads every byte."""
    for tensor in tensors:
        flat = tensor.detach().view(-1).view(torch.uint8)
        flat[: flat.numel() // 8 * 8].view(torch.int64).sum()  # a sum of narrower integers makes an int64 copy


def drop(folder):
    """Takes a folder's files out of the page cache."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def matrices(repeat):
    """Size and speed of one matrix, no files."""
    print(f"one matrix of {MATRIX}x{MATRIX}, {torch.get_num_threads()} threads; GB/s of dense weights")
    print("  dtype     pattern  bytes of dense  formula  pack  unpack  fresh  copy")
    for dtype in (torch.bfloat16, torch.float32):
        for sparsity, group in ((0.5, None), (0.6, None), (0.7, None), (0.8, None), (0.5, (2, 4))):
            generator = torch.Generator().manual_seed(0)
            weight = torch.randn(MATRIX, MATRIX, generator=generator)
            scores = weight.abs().view(-1, 4) if group else weight.abs().view(1, -1)
            zeros = scores.shape[1] // 2 if group else int(scores.shape[1] * sparsity)
            if group:
                weight.view(-1, 4).scatter_(1, scores.topk(zeros, largest=False).indices, 0)
            else:
                weight.view(-1)[scores.view(-1).argsort()[:zeros]] = 0
            weight = weight.to(dtype)
            bits = dtype.itemsize * 8
            formula = ((0.75 if group else 1) + bits * (1 - sparsity)) / bits
            packed = codec.pack(weight, group=group)
            assert torch.equal(codec.unpack(packed), weight)
            into = torch.empty_like(weight)
            speeds = [
                weight.nbytes / best(job, repeat)[0] / 1e9
                for job in (
                    lambda: codec.pack(weight, group=group),  # noqa: B023
                    lambda: codec.unpack(packed),  # noqa: B023
                    weight.clone,
                    lambda: into.copy_(weight),  # noqa: B023
                )
            ]
            name = "2:4" if group else f"{sparsity:.0%}"
            print(
                f"  {str(dtype)[6:]:9s} {name:>6s}  {len(packed) / weight.nbytes:14.4%}  {formula:7.2%}"
                f"  {speeds[0]:4.2f}  {speeds[1]:6.2f}  {speeds[2]:5.2f}  {speeds[3]:4.1f}"
            )


def made(hidden, sparsity):
    """A pruned random Llama in bf16."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=6,
        num_attention_heads=16,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    prune(model, make_plan(model, {"sparsity": sparsity, "pruner": "magnitude"}))
    return model


def writing(model, root, repeat):
    """[(what, seconds)] of writing `root/dense` and `root/packed`, and the same again."""
    dense, packed, again = root / "dense", root / "packed", root / "again"
    save_sparse(model, dense, max_shard_size="300MB")
    pack(dense, packed)
    state = dict(model.named_parameters())

    def timed(job):
        return best(job, repeat, before=lambda: shutil.rmtree(again, ignore_errors=True))

    rows = [
        ("safetensors alone: save_file", timed(lambda: save_file(state, root / "plain.safetensors"))),
        ("pack(folder)", timed(lambda: pack(dense, again))),
        ("unpack(folder)", timed(lambda: unpack(packed, again))),
        ("save_sparse, dense", timed(lambda: save_sparse(model, again))),
        ("save_sparse, bitmask", timed(lambda: save_sparse(model, again, layout="bitmask"))),
    ]
    shutil.rmtree(again)
    return rows


def load(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    touch(model.parameters())
    return model


def load_plain(folder):
    for file in folder.glob("*.safetensors"):
        touch(load_file(file).values())


def load_owned(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def read(folder):
    """Reads the weight files and does nothing with them."""
    piece = bytearray(2**20)
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(piece):
                pass


def reading(root, repeat, cold):
    """{what: [(seconds, CPU seconds)]} of reading both folders in turn."""
    jobs = {
        "packed files read, no more": (read, "packed"),
        "safetensors alone: load_file": (load_plain, "dense"),
        "from_pretrained, dense": (load, "dense"),
        "from_pretrained, dense, owned": (load_owned, "dense"),
        "from_pretrained, packed": (load, "packed"),
    }
    times = {name: [] for name in jobs}
    for _ in range(repeat):
        for name, (job, folder) in jobs.items():
            if cold:
                drop(root / folder)
            start, cpu = time.perf_counter(), time.process_time()
            job(root / folder)
            times[name].append((time.perf_counter() - start, time.process_time() - cpu))
    return times


def folders(hidden, sparsity, repeat, root):
    """A whole model: files written and read, loaded by transformers."""
    rows = writing(made(hidden, sparsity), root, repeat)
    size = folder_bytes(root / "dense")
    print(
        f"\na Llama of {size / 2e9:.2f} billion weights, bf16, {sparsity:.0%} sparse; packed {folder_bytes(root / 'packed') / size:.2%}"
    )
    found, wanted = load(root / "packed").state_dict(), load(root / "dense").state_dict()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    del found, wanted
    show = "  {:42s} {:5.2f} GB/s {:6.2f} GB a CPU second"
    for name, (seconds, cpu) in rows:
        print(show.format(name, size / seconds / 1e9, size / max(cpu, 1e-9) / 1e9))
    for cache in ("cold", "warm"):
        times = reading(root, repeat, cache == "cold")
        for name, runs in times.items():
            wall, cpu = (min(column) for column in zip(*runs, strict=True))
            print(show.format(f"{name}, {cache}", size / wall / 1e9, size / cpu / 1e9))
        packed = times["from_pretrained, packed"]
        for name, runs in times.items():
            if runs is packed or "no more" in name:
                continue
            ratio = median(run[0] / ours[0] for run, ours in zip(runs, packed, strict=True))
            print(f"  packed against {name}, {cache}: {ratio:.2f} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048, help="width of the model")
    parser.add_argument("--sparsity", type=float, default=0.5, help="of the model")
    parser.add_argument("--repeat", type=int, default=3, help="the best of so many times counts")
    parser.add_argument("--threads", type=int, help="torch's threads; default: its own choice")
    parser.add_argument("--folder", type=Path, help="where to write, on the disk to be measured; default: temporary")
    parser.add_argument("--torch", action="store_true", help="without the loops of checkpoint/bitmask/kernels.py")
    options = parser.parse_args()
    if options.torch:
        bits.kernels = lambda size: None
    if options.threads:
        torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; above 1 nothing below is worth quoting")
    matrices(options.repeat)
    root = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        folders(options.hidden, options.sparsity, options.repeat, root)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
