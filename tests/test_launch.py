"""Two processes of one launch agree with each other and with a single one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_sparsity import Plan, demo
from hf_sparsity.cli.main import main as command_line
from tests.conftest import tiny
from tests.launched import JOBS, command, run, run_all
from tests.tools import contents, several

ROOT = Path(__file__).parents[1]


def launch(*arguments):
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
    ]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return subprocess.run(
        [*command, "-m", "tests.launched", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for name in ("llama", "mixtral"):
        tiny(name).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def launched(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    with several(2) as call:
        call(run_all, source, out)
    return out


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_agree_with_one(name, source, launched):
    plan, weights = run(name, source)
    plans = [Plan.load(launched / f"{name}.{rank}.json") for rank in (0, 1)]
    assert plans[0] == plans[1]
    difference = max(abs(plan.layers[n].sparsity - plans[0].layers[n].sparsity) for n in plan.layers)
    assert difference == 0 if name == "spectra" else difference < 1e-6
    first, second = (load_file(launched / f"{name}.{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    bits = sum(int(((weights[key] == 0) != (first[key] == 0)).sum()) for key in first)
    assert bits <= 1e-5 * sum(value.numel() for value in first.values())
    assert all(torch.allclose(first[key], weights[key], atol=1e-4) for key in first)


def test_two_processes_stream_into_one_folder(source, launched, tmp_path):
    run("sparsegpt", source, tmp_path / "one")
    one, two = contents(tmp_path / "one"), contents(launched / "streamed")
    assert one.keys() == two.keys()
    assert one["model-00004-of-00004.safetensors"] == two["model-00004-of-00004.safetensors"]


def test_a_process_that_dies_ends_the_run_which_then_goes_on(small_demo, tmp_path):
    """And the command line in two processes masks what it masks in one."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(text for _, text in demo.texts("calibration")[:12]))
    given = ["prune", small_demo, "--sparsity", "0.5", "--pruner", "sparsegpt", "--calibration", str(text)]
    given += ["--sequences", "8", "--length", "128", "--output"]
    two = [*given, str(tmp_path / "two"), "--stream"]
    died = launch(1, *two)
    assert died.returncode != 0
    assert "the same command again" in died.stderr
    assert (tmp_path / "two" / "UNFINISHED").is_dir() and not (tmp_path / "two" / "config.json").exists()
    with several(2) as call:
        answers = call(command, two)
    assert [code for code, _ in answers] == [0, 0]
    assert "".join(printed for _, printed in answers).count("saved to") == 1
    assert command_line([*given, str(tmp_path / "one"), "--json"]) == 0
    one, two = (
        {k: v == 0 for file in (tmp_path / name).glob("*.safetensors") for k, v in load_file(file).items()}
        for name in ("one", "two")
    )
    different = {key: int((one[key] != two[key]).sum()) for key in one}
    # Sums over the sequences round differently, as they do with another number of threads. Where SparseGPT meets a near
    # tie it then takes another weight, and the blocks after it see other inputs; the first block shows the sums alone.
    first = [key for key in one if key.startswith("model.layers.0.")]
    assert sum(different[key] for key in first) <= 1e-5 * sum(one[key].numel() for key in first)
    assert sum(different.values()) <= 0.02 * sum(value.numel() for value in one.values())
