"""`hf-sparsity prune` into a folder: streamed, interrupted, started again."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from hf_sparsity.cli.main import main
from hf_sparsity.files import MARKER
from tests.tools import contents

GIVEN = ["prune", "demo", "--sparsity", "0.6", "--allocator", "owl", "--sequences", "4", "--length", "64"]


def test_stream_equals_memory(tmp_path, capsys):
    assert main([*GIVEN, "--output", str(tmp_path / "a")]) == 0
    assert "disk: about" in capsys.readouterr().out
    assert main([*GIVEN, "--output", str(tmp_path / "b"), "--stream", "--hidden-limit", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sparsity"] == pytest.approx(0.6, abs=0.01)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert main(["inspect", str(tmp_path / "b")]) == 0


def test_complete_or_foreign_folders_are_refused(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    for more in ([], ["--overwrite"]):
        assert main([*GIVEN, "--output", str(tmp_path / "mine"), *more]) == 2
        assert "choose another" in capsys.readouterr().err
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_says_how_to_go_on(number, tmp_path, capsys, monkeypatch):
    """Pressed while the first block is written, it counts once that is done."""
    out, replace = tmp_path / "out", os.replace
    before = signal.signal(number, signal.default_int_handler)  # a job in the background is deaf to Ctrl-C

    def pressed(source, target):
        if Path(target).suffix == ".safetensors":
            signal.raise_signal(number)
        replace(source, target)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", pressed)
            assert main([*GIVEN, "--output", str(out)]) == 130
    finally:
        signal.signal(number, before)
    said = capsys.readouterr().err
    assert "Start the same command again" in said and "Traceback" not in said
    assert (out / MARKER).is_dir() and len(list(out.glob("*.safetensors"))) == 1 and not list(out.rglob("*.partial"))
    assert main(["inspect", str(out)]) == 2


def test_what_cannot_fit_is_refused_with_advice(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    assert main([*GIVEN, "--output", str(tmp_path / "out")]) == 2
    assert "GiB are free" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    assert main([*GIVEN, "--output", str(tmp_path / "out")]) == 2
    assert "make room" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
