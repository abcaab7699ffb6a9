"""A run killed at any moment leaves a folder that does not load, or is right, and goes on to the same bits."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_50_runs_killed_at_random_moments(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "tests.pruning.kill", str(tmp_path), "50"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    killed = int(re.search(r"(\d+) of 50 runs", done.stdout)[1])
    assert killed >= 30, done.stdout  # the others had finished before
