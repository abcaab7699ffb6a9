"""Publishing and loading by Hub id, over real HTTP with a stand-in for the Hub on loopback.

huggingface_hub takes the Hub's address from the environment when it is imported, so what speaks to it runs in one
process of its own: `there(function, ...)` calls `function` in it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from tests.publish.hub_server import LARGE, TOKEN, Hub, speaking_to
from tests.tools import mostly_slow


@pytest.fixture(scope="module")
def hub():
    server = Hub()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    with speaking_to(hub, tmp_path_factory.mktemp("home")) as pool:
        yield pool


@pytest.fixture
def there(client, hub):
    """`there(function, ...)` calls `function` where huggingface_hub speaks to an empty stand-in."""
    hub.reset()
    return lambda function, *arguments, **options: client.submit(function, *arguments, **options).result()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{"dense": ..., "packed": ...}: a tiny model, sharded, half of it zero."""
    from hf_sparsity import SparsityConfig, make_plan, pack, prune, save_sparse
    from tests.conftest import tiny

    root = tmp_path_factory.mktemp("models")
    model = tiny("llama")
    report = prune(model, make_plan(model, SparsityConfig(sparsity=0.6, pruner="magnitude")))
    save_sparse(model, root / "dense", report=report, max_shard_size="150KB")
    (root / "dense" / "README.md").write_text("---\nlicense: mit\n---\n# My own words\n")
    (root / "dense" / "sparsity_plot.png").write_bytes(b"a picture")
    pack(root / "dense", root / "packed")
    return {name: root / name for name in ("dense", "packed")}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- what runs in the client: nothing above may import huggingface_hub


def push(folder, repo="me/model", token=TOKEN, **options):
    from hf_sparsity.publish.hub import push_sparse

    return push_sparse(folder, repo, token=token, **options)


def cached(branch):
    """Whether the ordinary cache has anything of this branch."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return (Path(HF_HUB_CACHE) / "models--me--model" / "refs" / branch).exists()


def auto(source, **options):
    from transformers import AutoModelForCausalLM

    import hf_sparsity  # noqa: F401

    return hashes(AutoModelForCausalLM.from_pretrained(source, **options))


def sparse(source, **options):
    from hf_sparsity import SparseModel

    return hashes(SparseModel.from_pretrained(source, **options))


def hashes(model) -> dict[str, str]:
    """Name -> hash of each tensor, streamed ones too."""
    from hf_sparsity.model.offload import weight_store

    streamed = weight_store(model)
    state = {name: streamed[name] if tensor.is_meta else tensor for name, tensor in model.state_dict().items()}
    return {name: hashlib.sha1(tensor.contiguous().numpy().tobytes()).hexdigest() for name, tensor in state.items()}


# ---- publishing


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_a_folder_is_published_in_one_commit_and_loads_bit_for_bit(layout, folders, there, hub):
    folder = folders[layout]
    url = there(push, folder)
    repo = hub.repositories["me/model"]
    assert url == f"{hub.url}/me/model/commit/{repo.branches['main']}"
    assert len(repo.commits) == 2 and repo.messages[-1] == "Sparse model: 60.0% of the prunable weights are zero"
    assert hub.visibilities == [None]  # the account's default
    published = hub.files("me/model")
    assert published.pop(".gitattributes")
    assert published == contents(folder) and b"My own words" in published["README.md"]
    assert hub.count("PUT /large/") == sum(name.endswith(LARGE) for name in published) >= 3
    local = there(auto, folder)
    assert there(auto, "me/model") == there(sparse, "me/model") == there(sparse, "me/model", offload="stream") == local


def test_privacy_and_token_reach_the_hub(folders, there, hub):
    there(push, folders["packed"], private=True)
    assert hub.visibilities == ["private"] and hub.repositories["me/model"].private
    assert hub.tokens == {TOKEN, None}  # None: signed addresses
    with pytest.raises(ValueError, match="me/model exists and is private, so the model would not be public"):
        there(push, folders["packed"], private=False)
    assert len(hub.repositories["me/model"].commits) == 2


def test_what_an_earlier_version_left_is_not_loaded_in_its_place(folders, there, hub):
    """transformers prefers one `model.safetensors` to an index of shards."""
    there(push, folders["dense"])
    hub.repositories["me/model"].commit("main", {**hub.files("me/model"), "model.safetensors": b"old"}, "by hand")
    there(push, folders["dense"])
    assert "model.safetensors" not in hub.files("me/model")
    there(push, folders["packed"])
    assert {name for name in hub.files("me/model") if name.startswith("model")} == set()
    assert there(auto, "me/model") == there(auto, folders["packed"])


def test_only_what_belongs_to_the_model_is_published(folders, there, hub, tmp_path):
    folder = shutil.copytree(folders["packed"], tmp_path / "model")
    for name in (".env", "training_args.bin", "checkpoint-10/optimizer.pt", ".cache/x", "__pycache__/x", "runs/x"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not for the world")
    (folder / "chat").mkdir()
    (folder / "chat/template.jinja").write_text("hello")
    there(push, folder, commit_message="my words")
    expected = {".gitattributes", "chat/template.jinja", *contents(folders["packed"])}
    assert set(hub.files("me/model")) == expected and hub.repositories["me/model"].messages[-1] == "my words"


def test_a_branch_is_made_and_a_pull_request_leaves_main_alone(folders, there, hub):
    there(push, folders["packed"], revision="v2")
    there(push, folders["packed"], revision="v2", commit_message="nothing is new")
    repo = hub.repositories["me/model"]
    assert set(hub.files("me/model")) == {".gitattributes"} and len(hub.files("me/model", "v2")) > 5
    assert repo.messages == ["initial commit", "Sparse model: 60.0% of the prunable weights are zero"]
    assert there(push, folders["packed"], create_pr=True) == f"{hub.url}/me/model/discussions/1"
    assert set(hub.files("me/model")) == {".gitattributes"} and len(hub.files("me/model", "refs/pr/1")) > 5


@pytest.mark.parametrize("place", ["a large file", "the commit"])
def test_an_interrupted_upload_goes_on_and_sends_nothing_twice(place, folders, there, hub):
    """One large file fails for good, or the connection breaks when all are there."""
    folder = folders["dense"]
    large = {hashlib.sha256(data).hexdigest() for name, data in contents(folder).items() if name.endswith(LARGE)}
    if place == "a large file":
        hub.fail = lambda method, path: 400 if path == f"/large/{min(large)}" else None
    else:
        hub.fail = lambda method, path: "drop" if "/commit/" in path else None
    with pytest.raises(OSError, match=r"nothing of the model became visible|what was sent already is not sent again"):
        there(push, folder)
    sent = set(hub.large)
    assert sent < large if place == "a large file" else sent == large
    assert set(hub.files("me/model")) == {".gitattributes"}
    hub.log.clear()
    hub.fail = lambda method, path: None
    there(push, folder)
    assert {line for line in hub.log if line.startswith("PUT")} == {f"PUT /large/{name}" for name in large - sent}
    assert hub.files("me/model").items() >= contents(folder).items()
    assert len(hub.repositories["me/model"].commits) == 2


# ---- refusals


def test_errors_of_the_hub_say_what_to_do(folders, there, hub):
    def told(*arguments, **options):
        with pytest.raises(OSError) as error:
            there(push, folders["packed"], *arguments, **options)
        assert type(error.value).__name__ == "HubError" and "\n" not in str(error.value)
        return str(error.value)

    assert "hf auth login" in (wrong := told(token="hf_wrong")) and "Invalid" in wrong
    assert "hf auth login" in told(token=False)
    assert "needs write access there" in (denied := told("others/model")) and "namespace 'others'" in denied
    for status, words in (
        (402, "no room"),
        (404, "check the name"),
        (409, "push again"),
        (400, "refused"),
        (418, "refused"),
    ):
        hub.fail = lambda method, path, status=status: status if "/preupload/" in path else None
        assert words in told(), status
    hub.fail = lambda method, path: "drop"
    assert "could not be reached" in told()
    assert set(hub.files("me/model")) == {".gitattributes"}


def test_a_card_that_the_hub_refuses_stops_before_the_weights(folders, there, hub, tmp_path):
    folder = shutil.copytree(folders["packed"], tmp_path / "model")
    (folder / "README.md").write_text("---\nlicence_of_nothing: 1\n---\n")
    with pytest.raises(ValueError, match=r"README\.md"):
        there(push, folder)
    assert hub.count("PUT") == 0 and len(hub.repositories["me/model"].commits) == 1


def spoil_pickle(folder):
    (folder / "pytorch_model.bin").write_bytes(b"")


def spoil_link(folder):
    (folder / "notes.txt").symlink_to(folder.parent / "secret")


def spoil_folder_link(folder):
    (folder / "notes").symlink_to(folder.parent)


def spoil_index(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../secret"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def spoil_index_entirely(folder):
    (folder / "model.safetensors.index.json").write_text("[]")


def spoil_shard(folder):
    next(folder.glob("model-00001-of*")).unlink()


def spoil_run(folder):
    (folder / "UNFINISHED").mkdir()
    spoil_shard(folder)  # what is missing is not the reason


def spoil_plan(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["sparsity_config"]
    (folder / "config.json").write_text(json.dumps(config))


def spoil_zeros(folder):
    from safetensors.torch import load_file, save_file

    for file in folder.glob("model-*.safetensors"):
        save_file({name: tensor + 0.5 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


SPOILED = {
    spoil_pickle: "only safetensors are published",
    spoil_link: "points outside",
    spoil_folder_link: "points outside",
    spoil_index: "which is not a file of",
    spoil_index_entirely: "no weight_map",
    spoil_shard: "which is not a file of",
    spoil_run: "unfinished",
    spoil_plan: "no sparsity",
    spoil_zeros: "zeros",
}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_what_is_not_fit_to_be_published_is_refused_without_the_network(spoil, folders, tmp_path):
    """In this process, in which huggingface_hub is offline and would say so."""
    folder = shutil.copytree(folders["dense"], tmp_path / "model")
    (tmp_path / "secret").write_text("of mine")
    spoil(folder)
    with pytest.raises(ValueError, match=SPOILED[spoil]):
        push(folder)


def test_wrong_arguments_are_refused_without_the_network(folders, tmp_path):
    for repo in ("a/b/c", "me/with space", "", "-me/model"):
        with pytest.raises(ValueError):
            push(folders["packed"], repo)
    with pytest.raises(ValueError, match="create_pr or revision"):
        push(folders["packed"], revision="v2", create_pr=True)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        push(tmp_path / "nowhere")
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set"):
        push(folders["packed"])


# ---- loading by Hub id


@pytest.mark.parametrize("layout", mostly_slow(["dense", "packed"], ["packed"]))
def test_loading_says_where_the_model_is_to_everybody_who_asks(layout, folders, there, hub, tmp_path):
    """A private repository, another branch, a subfolder, a cache of one's own, a token that is nowhere else."""
    there(push, folders["dense"], private=True)
    inner = {f"inner/{name}": data for name, data in contents(folders[layout]).items()}
    hub.repositories["me/model"].commit("v2", inner, "elsewhere")
    place = {"revision": "v2", "subfolder": "inner", "token": TOKEN, "cache_dir": str(tmp_path / "cache")}
    local = there(auto, folders[layout])
    hub.log.clear(), hub.tokens.clear()
    assert there(auto, "me/model", **place) == local
    assert there(sparse, "me/model", **place) == local
    assert there(sparse, "me/model", **place, offload="stream") == local
    assert hub.tokens == {TOKEN}
    assert (tmp_path / "cache/models--me--model").is_dir()
    assert not there(cached, "v2"), "in the cache that was not asked for"
    asked = [line.split("/resolve/")[1].split("/", 1) for line in hub.log if "/resolve/" in line]
    assert {revision for revision, _ in asked} <= {"v2", hub.repositories["me/model"].branches["v2"]}
    asked = [file for _, file in asked if file != "adapter_config.json"]  # transformers asks for it without subfolder
    assert asked and all(file.startswith("inner/") for file in asked)
    with pytest.raises(OSError, match="me/model"):
        there(auto, "me/model", **{**place, "token": False, "cache_dir": str(tmp_path / "other")})
