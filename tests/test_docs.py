"""README and docs: every code block runs, and what is generated is up to date."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
from pathlib import Path

import pytest

from hf_sparsity.cli.main import main

ROOT = Path(__file__).parents[1]
RUN = ("README.md", "docs/concepts.md")  # in order, each in a folder of its own


def blocks(page: str, kind: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [block for language, block in re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL) if language == kind]


@pytest.fixture(scope="module")
def render():
    spec = importlib.util.spec_from_file_location("render", ROOT / "docs/render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", RUN)
def test_the_commands_and_the_python_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks(page, "bash") for line in block.strip().splitlines()]
    assert len(lines) >= 3 and all(line.startswith("hf-sparsity ") for line in lines), "a command that nothing runs"
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, line
    code = "\n".join(blocks(page, "python"))
    assert code.count("\n") > 10
    exec(compile(code, page, "exec"), {"__name__": __name__})


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 12_000


def test_the_two_commands_are_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make (\w+)`", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert f"\n{target}:" in makefile


def test_generated_parts_are_up_to_date(render):
    assert [str(path.relative_to(ROOT)) for path, _ in render.outdated()] == [], "run: python docs/render.py"


def test_every_part_is_used_and_filled(render):
    texts = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in render.PAGES)
    assert {name for _, name in re.findall(r"(<!-- generated: (\w+) -->)", texts)} == set(render.RENDERERS)
    assert not re.search(r"<!-- generated: \w+ -->\n<!-- end -->", texts)


def test_links_lead_somewhere():
    for page in (*RUN, "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))):
        text = (ROOT / page).read_text(encoding="utf-8")
        headings = {}
        for target in re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            file, _, anchor = target.partition("#")
            if file.startswith("http"):
                continue
            there = (ROOT / page).parent / file if file else ROOT / page
            assert there.exists(), f"{page}: {target}"
            if anchor:
                words = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), flags=re.MULTILINE)
                headings[there] = {re.sub(r"[^\w\- ]", "", word.lower()).replace(" ", "-") for word in words}
                assert anchor in headings[there], f"{page}: {target}"


def test_the_public_functions_have_whole_docstrings():
    import hf_sparsity

    for name in hf_sparsity.__all__:
        if not name.startswith("_"):
            assert len((getattr(hf_sparsity, name).__doc__ or "").split()) > 5, name
    assert os.path.exists(ROOT / "docs/llms.txt")
