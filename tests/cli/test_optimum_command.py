"""The command under other names: `optimum-cli sparsify` and `hf sparsity`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from datetime import datetime, timezone
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REGISTERED = "optimum/commands/register/register_hf_sparsity.py"
GIVEN = ["--sparsity", "0.6", "--pruner", "magnitude"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder for PYTHONPATH with the file where an installation puts it, in a part of optimum's namespace."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / REGISTERED).parent.mkdir(parents=True)
    shutil.copyfile(ROOT / "hf_sparsity/cli/optimum_command.py", folder / REGISTERED)
    return folder


def optimum(installed: Path, *arguments: str, after: str = "") -> subprocess.CompletedProcess[str]:
    """`optimum-cli ARGUMENTS` in a fresh process, and then `after`."""
    register = str(installed / REGISTERED.rpartition("/")[0])
    code = (  # what an installation beside this one registered would be found, too
        "import sys\nimport optimum.commands.register as register\n"
        f"register.__path__ = register.__spec__.submodule_search_locations = [{register!r}]\n"
        "from optimum.commands.optimum_cli import main\n"
        f"sys.argv = ['optimum-cli', *{list(arguments)!r}]\ntry:\n    main()\nfinally:\n    {after or 'pass'}"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )


def test_help_is_that_of_prune_and_needs_no_torch(installed):
    done = optimum(
        installed, "sparsify", "--help", after="print('LOADED', {'torch', 'transformers'} & set(sys.modules))"
    )
    assert done.returncode == 0, done.stderr
    assert "usage: optimum-cli sparsify" in done.stdout and "LOADED set()" in done.stdout
    ours = subprocess.run(
        [sys.executable, "-m", "hf_sparsity", "prune", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    shown = [
        text.replace("optimum-cli sparsify", "").replace("hf-sparsity prune", "") for text in (done.stdout, ours.stdout)
    ]
    assert shown[0].split("LOADED")[0].split() == shown[1].split()


def test_a_run_equals_hf_sparsity_prune_bit_for_bit(installed, small_demo, tmp_path):
    from hf_sparsity.cli.main import main

    done = optimum(installed, "sparsify", small_demo, *GIVEN, "--output", str(tmp_path / "optimum"))
    assert done.returncode == 0, done.stderr
    assert main(["prune", small_demo, *GIVEN, "--output", str(tmp_path / "ours"), "--json"]) == 0
    files = {name: sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("optimum", "ours")}
    assert files["optimum"] == files["ours"]
    for name in files["ours"]:
        if name != "sparsity_report.json":  # it has seconds
            assert (tmp_path / "optimum" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes(), name


def test_mistakes_have_the_exit_codes_of_hf_sparsity(installed, tmp_path):
    done = optimum(installed, "sparsify", "demo", *GIVEN[:-1], "nonsense", "--output", str(tmp_path / "new"))
    assert done.returncode == 2 and "nonsense" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["standard", "editable"])
def test_wheels_register_the_command_and_keep_the_namespace(kind, tmp_path):
    """What a wheel puts under `optimum/` is the one file: an `__init__.py` there would hide optimum itself."""
    pytest.importorskip("hatchling")
    pytest.importorskip("editables")
    code = f"import hatchling.build as build; build.build_{'wheel' if kind == 'standard' else 'editable'}({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if name.startswith("optimum")] == [REGISTERED]
        archive.extractall(tmp_path / "site")
    if kind == "editable":
        assert not (tmp_path / "site/hf_sparsity").exists()
    else:
        package = ROOT / "hf_sparsity"
        needed = [path for path in package.rglob("*") if path.suffix in (".md", ".html", ".css")]
        needed += (package / "demo/model").iterdir()
        assert needed and all((tmp_path / "site" / path.relative_to(ROOT)).exists() for path in needed), (
            "templates, model"
        )
    done = optimum(tmp_path / "site", "--help")
    assert "sparsify" in done.stdout and "export" in done.stdout


def test_hf_runs_it_as_an_extension(tmp_path):
    """`hf extensions install OWNER/hf-sparsity` wants a console script of the repository's name; `hf sparsity` calls it."""
    assert [script.value for script in entry_points(group="console_scripts", name="hf-sparsity")] == [
        "hf_sparsity.cli.main:main"
    ]
    from huggingface_hub.cli.extensions import EXTENSIONS_ROOT, ExtensionManifest

    script = Path(sys.executable).with_name("hf-sparsity")
    root = tmp_path / EXTENSIONS_ROOT.relative_to("~") / "hf-sparsity"
    now = datetime.now(timezone.utc)
    ExtensionManifest("me", "hf-sparsity", "me/hf-sparsity", "sparsity", str(script), "python", now).save(root)
    environment = {**os.environ, "HOME": str(tmp_path), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    hf = [str(script.with_name("hf")), "sparsity"]
    done = subprocess.run([*hf, "inspect", "--help"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0 and "hf-sparsity inspect" in done.stdout, done.stderr
    assert subprocess.run([*hf, "inspect"], capture_output=True, env=environment, check=False).returncode == 2
