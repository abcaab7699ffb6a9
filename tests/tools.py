"""What tests of several folders use: other processes, models that count or fail, and what is in a folder."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_sparsity.distributed import Processes

# Other processes are forked from one that has imported torch and transformers and computed nothing: an interpreter
# that imports them anew takes longer than most tests.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tests.preloaded"])


def row_and_column(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Of a product of independent axes: the first combination, and each other value of each axis with the first of the others."""
    values = [list(axis) for axis in axes]
    first = tuple(axis[0] for axis in values)
    others = [(*first[:i], value, *first[i + 1 :]) for i, axis in enumerate(values) for value in axis[1:]]
    return [first, *others]


def mostly_slow(values: Iterable[Any], quick: Iterable[Any]) -> list[Any]:
    """The values as parameters; those that are not in `quick` are left to the slow run."""
    quick = list(quick)
    whole = [(value, value if isinstance(value, tuple) else (value,)) for value in values]
    return [value if value in quick else pytest.param(*parts, marks=pytest.mark.slow) for value, parts in whole]


def launched(rank: int, count: int, port: int) -> dict[str, str]:
    """The environment that `accelerate launch` gives each process."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    lo = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    fixed = {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return {name: str(value) for name, value in names.items()} | fixed | lo


def free_port() -> int:
    """A port of this machine that nobody listens to."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@contextmanager
def several(count: int = 2) -> Iterator[Callable[..., list[Any]]]:
    """`call(function, *args)` runs `function(processes, *args)` on `count` real processes, and returns what each did."""
    port, pipes, started = free_port(), [], []
    try:
        for rank in range(count):
            here, there = FORKED.Pipe()
            pipes.append(here)
            started.append(FORKED.Process(target=serve, args=(there, launched(rank, count, port)), daemon=True))
            started[-1].start()

        def call(function: Callable[..., Any], *args: Any) -> list[Any]:
            for pipe in pipes:
                pipe.send((function, args))
            answers = [pipe.recv() if pipe.poll(120) else (False, "no answer") for pipe in pipes]
            assert all(fine for fine, _ in answers), "\n".join(str(answer) for fine, answer in answers if not fine)
            return [answer for _, answer in answers]

        yield call
    finally:
        for process in started:
            process.terminate()
            process.join()


def serve(pipe: Any, environment: dict[str, str]) -> None:
    """What each process of `several` does until it is ended."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    processes = Processes.current()
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((True, function(processes, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def in_another_process(function: Callable[..., None], *args: Any) -> int:
    """Runs `function(*args)` there; returns its exit code, below 0 for the signal that ended it."""
    process = FORKED.Process(target=_alone, args=(function, args), daemon=True)
    process.start()
    process.join()
    return process.exitcode


def _alone(function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    function(*args)


def count_calls(module: nn.Module) -> list[None]:
    """A list that gets an entry at each forward pass of the module from now on."""
    calls: list[None] = []
    module.register_forward_pre_hook(lambda *_: calls.append(None))
    return calls


def fail_at(module: nn.Module, call: int, error: type[BaseException]) -> None:
    """Makes the forward of a module raise `error` at this call, counted from 1, and at no other."""
    calls = count_calls(module)

    def fail(*_: Any) -> None:
        if len(calls) == call:
            raise error

    module.register_forward_pre_hook(fail)


def waiting_on_disk(model: nn.Module, folder: Path) -> set[str]:
    """The names of the hidden states' files that are in `folder` while any module of the model computes; it grows."""
    names: set[str] = set()

    def look(*_: Any) -> None:
        names.update(file.name for file in folder.glob("hidden_*/*"))

    for module in model.modules():
        module.register_forward_hook(look)
    return names


def contents(folder: Path) -> dict[str, str]:
    """{name: hash} of every file of a finished folder, times taken out of the report."""
    hashes = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        data = file.read_bytes()
        if file.name == "sparsity_report.json":
            report = json.loads(data)
            report.pop("seconds")
            for layer in report["layers"].values():
                layer.pop("seconds", None)
            data = json.dumps(report).encode()
        hashes[str(file.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return hashes
