"""Publishes a sparse model's folder, with its card and plot, in one commit of a Hub repository.

transformers' own `push_to_hub` replaces the README by one of its own, and huggingface_hub's `upload_folder` may cut a large
folder into several commits, between which nobody can load it. Here all checks come first, without the network; then the
weights are sent; then one commit makes everything visible. What was sent before an interruption is not sent again: the
Hub knows content by its hash.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..checkpoint.source import LEFTOVERS
from ..files import check_finished
from ..model.accepted import check_path
from ..plan import Plan, read_json

logger = logging.getLogger(__name__)

CARD = "README.md"
_WEIGHTS = re.compile(r"(model|sparse)(-\d{5,6}-of-\d{5,6})?\.safetensors(\.index\.json)?")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill")


class HubError(OSError):
    """A push that the Hub refused, or that did not reach it. The repository shows all of a push or nothing of it."""


def push_sparse(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Publishes a sparse model's folder, dense or packed, in one commit; an interrupted upload goes on when called again.

    A model card is made first where the folder has none (`make_card`); one that is there is kept as it is. Weight files that
    an earlier version of the model left in the repository are removed by the same commit, since they could be loaded in
    place of the new ones. Hidden files, caches and what the Trainer leaves beside a model stay at home.

    Args:
        folder: what `save_sparse`, `prune`, `pack` or `recover` wrote.
        repo_id: "user/name", or "name" for your own; made if it does not exist.
        private: whether a new repository is; None leaves it to the account's default.
        token: by default the one that `hf auth login` stored, or the environment's `HF_TOKEN`.
        revision: a branch, made if it does not exist; by default `main`.
        commit_message: one line.
        create_pr: proposes the commit as a pull request, for a repository that one may not write to.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        FileNotFoundError: no such folder, or no `config.json`.
        ValueError: before anything is sent: a bad repository id; a folder that is unfinished, has no plan, has not the
            zeros of its plan, holds pickled weights or points outside itself; a repository that is there already and
            is public where `private=True`, or the reverse; a card that the Hub refuses.
        HubError: the Hub could not be reached, or refused.
    """
    validate_repo_id(repo_id)
    if create_pr and revision is not None:
        raise ValueError("give create_pr or revision, not both: a pull request is opened against the main branch")
    check_path(folder)
    folder = Path(folder)
    plan = check_publishable(folder)
    if not (folder / CARD).exists():
        from .card.make_card import make_card

        make_card(folder, name=repo_id)
    files = files_to_publish(folder)
    message = commit_message or f"Sparse model: {plan.sparsity:.1%} of the prunable weights are zero"
    with _explained(repo_id):
        api = HfApi(token=token, library_name="hf_sparsity")
        repo = _repository(api, repo_id, private, revision)
        there = api.list_repo_files(repo, revision=revision)
        operations: list[Any] = [CommitOperationAdd(name, str(file.absolute())) for name, file in files.items()]
        operations += [CommitOperationDelete(name) for name in there if _WEIGHTS.fullmatch(name) and name not in files]
        done = api.create_commit(repo, operations, commit_message=message, revision=revision, create_pr=create_pr)
    return str(done.pr_url or done.commit_url)


def check_publishable(folder: Path) -> Plan:
    """Returns the plan of a folder that may be published. Raises ValueError or FileNotFoundError that says why not."""
    from .verify.verify import verify

    if not folder.is_dir():
        raise FileNotFoundError(f"{str(folder)!r} is not a folder; give the folder of a sparse model")
    check_finished(folder)
    files_to_publish(folder)
    result = verify(folder)
    if not result.ok:
        reasons = "; ".join(f"{finding.where}: {finding.message}".removeprefix(": ") for finding in result.failed[:3])
        raise ValueError(
            f"{str(folder)!r} does not hold what it says ({len(result.failed)} checks failed): {reasons}. "
            f"`hf-sparsity verify {folder}` shows all"
        )
    return Plan.load(folder)


def files_to_publish(folder: Path) -> dict[str, Path]:
    """Returns {name in the repository: file}, sorted; files that do not belong to the model are left out.

    Raises:
        ValueError: a link that points outside the folder, pickled weights, or an index that names other than plain files
            beside it.
    """
    home, files = folder.resolve(), {}
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if not path.resolve().is_relative_to(home):
            raise ValueError(f"{path} points outside {str(folder)!r}; put the file itself there, or remove the link")
        if path.suffix.lower() in _PICKLES:
            raise ValueError(
                f"{path} is a pickle or may be one; only safetensors are published. Save the model again with "
                "save_sparse(...), or remove the file"
            )
        if path.is_file():
            files[name] = path
    for name in [name for name in files if _WEIGHTS.fullmatch(name) and name.endswith(".index.json")]:
        index = read_json(files[name])
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict):
            raise ValueError(f"{files[name]} has no weight_map")
        if strange := sorted({str(file) for file in weight_map.values()} - set(files)):
            raise ValueError(f"{files[name]} names {strange[0]!r}, which is not a file of {str(folder)!r}")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """Yields all files and folders but leftovers, sorted; links to folders are yielded, not entered."""
    for path in sorted(folder.iterdir()):
        if LEFTOVERS.fullmatch(path.name):
            continue
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)


def _repository(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> str:
    """Makes the repository and the branch where they do not exist; returns the repository's full id.

    Raises:
        ValueError: the repository exists, and is not as public or private as asked for.
    """
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    info = api.model_info(repo)
    if private is not None and info.private is not None and bool(info.private) != private:
        is_, wanted = ("private", "public") if info.private else ("public", "private")
        raise ValueError(
            f"{repo} exists and is {is_}, so the model would not be {wanted}: change that in the repository's settings, "
            "choose another name, or leave the choice out"
        )
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo, branch=revision, exist_ok=True)
    return repo


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turns what goes wrong between here and the Hub into a `HubError` that says what to do."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise HubError("HF_HUB_OFFLINE is set, so the Hub is out of reach; unset it to publish") from error
    except (HTTPError, RuntimeError, OSError) as error:  # of a large file: RuntimeError with a cause; OSError by Xet
        raise HubError(f"{_advice(error, repo_id)} ({_reason(error)})") from error


def _advice(error: BaseException, repo_id: str) -> str:
    """Returns what a person can do about an error of the Hub."""
    status = getattr(getattr(_root(error), "response", None), "status_code", None)
    if status == 401:
        return f"The Hub knows no token that may see or write {repo_id}: run `hf auth login`, or set HF_TOKEN."
    if status == 403 or isinstance(error, PermissionError):
        return (
            f"The token may not do this to {repo_id}: it needs write access there (https://huggingface.co/settings/tokens), "
            "and the account room for the files."
        )
    if status in (402, 413, 507):
        return f"The account of {repo_id} has no room for the files: see its storage in the Hub's billing settings."
    if status == 404:
        return f"The Hub has no {repo_id}, or not this revision, or the token may not see it: check the name."
    if status in (409, 412):
        return f"Somebody else changed {repo_id} at the same time: push again."
    if status is not None and 400 <= status < 500 and status != 429:
        return f"The Hub refused what was sent to {repo_id}; nothing of the model became visible."
    return "The Hub could not be reached or failed: push again later; what was sent already is not sent again."


def _root(error: BaseException) -> BaseException:
    """Returns the error of the failed request itself, which others may have been raised from."""
    while not isinstance(error, HTTPError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    """Returns what the server or the connection said, in one line."""
    root = _root(error)
    return " ".join((getattr(root, "server_message", None) or str(root) or type(root).__name__).split())
