"""`hf-sparsity push`, and commands that are given a Hub id, against the stand-in for the Hub."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.publish.hub_server import TOKEN, Hub, speaking_to


@pytest.fixture(scope="module")
def hub():
    server = Hub()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def command(hub, tmp_path_factory):
    """Runs a command line where huggingface_hub speaks to the stand-in: (exit code, standard output, standard error)."""
    with speaking_to(hub, tmp_path_factory.mktemp("home")) as pool:
        yield lambda *arguments, token=TOKEN: pool.submit(run, arguments, token).result()


def run(arguments, token):
    import contextlib
    import io
    import os

    from hf_sparsity.cli.main import main

    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), error.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from hf_sparsity import SparsityConfig, make_plan, prune, save_sparse
    from tests.conftest import tiny

    model = tiny("llama")
    report = prune(model, make_plan(model, SparsityConfig(sparsity=0.5, pruner="magnitude")))
    return save_sparse(model, tmp_path_factory.mktemp("models") / "sparse", report=report)


def test_push_makes_the_card_that_is_missing_and_says_where_the_model_is(hub, command, folder, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "sparse")
    code, out, error = command("push", folder, "me/sparse-llama", "--private", "--message", "first")
    assert code == 0, error
    commit = hub.repositories["me/sparse-llama"].branches["main"]
    assert out == f"published {folder}: {hub.url}/me/sparse-llama/commit/{commit}\n"
    assert hub.repositories["me/sparse-llama"].messages == ["initial commit", "first"]
    assert hub.repositories["me/sparse-llama"].private
    card = hub.files("me/sparse-llama")["README.md"].decode()
    assert 'from_pretrained("me/sparse-llama")' in card and "sparsity_plan.png" in hub.files("me/sparse-llama")
    (folder / "README.md").write_text(card + "\nOne more line.\n")  # else there is nothing to propose
    code, out, _ = command("push", folder, "me/sparse-llama", "--create-pr", "--json")
    assert code == 0 and json.loads(out)["url"] == f"{hub.url}/me/sparse-llama/discussions/1"


def test_exit_codes(hub, command, folder, tmp_path):
    """2: refused before anything was sent; 1: the Hub said no."""
    hub.reset()
    assert command("push", folder, "not/a/name")[0] == 2
    assert command("push", tmp_path, "me/model")[0] == 2
    assert command("push", folder, "me/model", "--private", "--public")[0] == 2
    assert hub.log == []
    code, out, error = command("push", folder, "me/model", "--json", token=None)
    assert code == 1 and "hf auth login" in error and "hf auth login" in json.loads(out)["error"]


def test_a_model_on_the_hub_is_planned_at_its_revision(hub, command, folder, tmp_path):
    hub.reset()
    assert command("push", folder, "me/model", "--revision", "v2", "--private")[0] == 0
    given = ("--sparsity", "0.7", "--pruner", "magnitude", "--output", tmp_path / "plan.json")
    assert command("plan", "me/model", *given)[0] == 2  # main is empty
    code, out, error = command("plan", "me/model", "--revision", "v2", *given, "--json")
    assert code == 0, error
    assert json.loads(out)["sparsity"] == pytest.approx(0.7)
    streamed = ("--sparsity", "0.7", "--pruner", "magnitude", "--stream", "--output", tmp_path / "pruned")
    assert command("prune", "me/model", "--revision", "v2", *streamed)[0] == 0
    assert (tmp_path / "pruned" / "config.json").exists()
