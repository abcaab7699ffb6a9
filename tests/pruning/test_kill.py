"""A run killed at any moment leaves a folder that does not load, or is right, and goes on to the same bits."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import transformers as hf

from hf_sparsity import SparsityConfig, make_plan, prune
from hf_sparsity.checkpoint.output import Output
from hf_sparsity.checkpoint.streamed import open_streamed
from tests.conftest import tiny, tiny_batch
from tests.tools import contents, in_another_process

SEARCH = {"name": "msp", "generations": 1, "population": 3, "parents": 2}
JOBS = {  # name: (architecture, streamed, config, hidden_limit)
    "streamed": ("llama", True, SparsityConfig(0.5, allocator="owl", pruner="wanda"), None),
    "second order": ("llama", False, SparsityConfig(0.5, pruner="sparsegpt"), None),
    "experts": ("mixtral", True, SparsityConfig(0.5, allocator="alphapruning", pruner="wanda"), 0),
    "search": ("llama", True, SparsityConfig(0.5, allocator=SEARCH), None),
}


def job(name: str, source: Path, output: Path, after_record=None) -> None:
    architecture, streamed, config, limit = JOBS[name]
    batch = tiny_batch(architecture, sequences=3)
    batches = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(3)]
    folder = source / architecture
    model = open_streamed(folder) if streamed else hf.AutoModelForCausalLM.from_pretrained(folder)
    plan = make_plan(model, config, batches, output_dir=Output(output, after_record=after_record), hidden_limit=limit)
    prune(model, plan, batches, output_dir=Output(output, after_record=after_record), hidden_limit=limit)


def killed_at_a_record(number: int, *given) -> None:
    """Runs a job until so many things are on record, and is killed there."""
    left = [number]

    def after_record(record):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    job(*given, after_record)


def killed_at_a_moment(seconds: float, *given) -> None:
    """Runs a job until it has computed for so many seconds; the signal, which nobody handles, ends it there."""
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    job(*given)


def timed(file: Path, *given) -> None:
    """Runs a job and writes down for how many seconds it computed."""
    before = os.times().user
    job(*given)
    file.write_text(str(os.times().user - before))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Of each job: its sources, how many records it writes, the contents of its folder."""
    folder = tmp_path_factory.mktemp("whole")
    for architecture in ("llama", "mixtral"):
        tiny(architecture).save_pretrained(folder / architecture)
    records = {name: [] for name in JOBS}
    for name in JOBS:
        job(name, folder, folder / name, records[name].append)
    return folder, {name: len(records[name]) for name in JOBS}, {name: contents(folder / name) for name in JOBS}


def goes_on(name: str, source: Path, output: Path, expected: dict[str, str]) -> None:
    """Checks what a killed run left, and that the same call ends with the same bits."""
    if (output / "config.json").exists():
        left = {key: value for key, value in contents(output).items() if not key.startswith("UNFINISHED")}
        assert left == expected, "the folder loads and is wrong"
    if not (output / "config.json").exists() or (output / "UNFINISHED" / "journal.jsonl").exists():
        job(name, source, output)
    assert contents(output) == expected


@pytest.mark.parametrize("part", ["first", "middle", "last"])
@pytest.mark.parametrize("name", JOBS)
def test_runs_killed_at_a_record(name, part, whole, tmp_path):
    source, records, expected = whole
    number = {"first": 1, "middle": records[name] // 2, "last": records[name]}[part]
    code = in_another_process(killed_at_a_record, number, name, source, tmp_path / "out")
    assert code == -signal.SIGKILL
    goes_on(name, source, tmp_path / "out", expected[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_50_runs_killed_at_random_moments(name, whole, tmp_path):
    source, _, expected = whole
    rng = random.Random(0)
    assert in_another_process(timed, tmp_path / "seconds", name, source, tmp_path / "timed") == 0
    seconds, killed = float((tmp_path / "seconds").read_text()), 0
    for trial in range(50):
        output = tmp_path / str(trial)
        code = in_another_process(killed_at_a_moment, rng.uniform(0, seconds), name, source, output)
        assert code in (0, -signal.SIGVTALRM)
        killed += code != 0
        goes_on(name, source, output, expected[name])
    assert killed >= 30  # the others had finished before
