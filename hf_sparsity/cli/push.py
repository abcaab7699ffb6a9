"""The command `hf-sparsity push`: publishes a sparse model's folder, card and plot on the Hub, in one commit."""

from __future__ import annotations

import argparse
import sys
from typing import Any

HELP = "publish a sparse model's folder on the Hub, with its card, in one commit"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the command's arguments. None is a token, which everybody on the machine could see on a command line."""
    command.add_argument("folder", help="a sparse model's folder")
    command.add_argument("repo", help="USER/NAME on the Hub; made if it does not exist")
    visible = command.add_mutually_exclusive_group()
    visible.add_argument(
        "--private",
        action="store_const",
        const=True,
        help="only you see a new repository (default: what your account does with new repositories)",
    )
    visible.add_argument("--public", dest="private", action="store_const", const=False, help="everybody sees it")
    command.add_argument("--revision", metavar="BRANCH", help="made if it does not exist (default: main)")
    command.add_argument("--message", metavar="TEXT", help="of the commit")
    command.add_argument("--create-pr", action="store_true", help="propose the commit as a pull request")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Publishes the folder with the token of `hf auth login` or `HF_TOKEN`."""
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    from ..publish.hub import push_sparse

    if not sys.stderr.isatty():
        disable_progress_bars()
    url = push_sparse(
        options.folder,
        options.repo,
        private=options.private,
        revision=options.revision,
        commit_message=options.message,
        create_pr=options.create_pr,
    )
    if not options.json:
        print(f"published {options.folder}: {url}")
    return {"folder": options.folder, "repo": options.repo, "url": url}
