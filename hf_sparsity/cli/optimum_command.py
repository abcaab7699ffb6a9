"""`optimum-cli sparsify`: what `hf-sparsity prune` does, with the same options.

An installation puts this file into optimum's namespace as `optimum/commands/register/register_hf_sparsity.py`, where
`optimum-cli` finds it each time it starts; so nothing heavy may be imported here, and imports are absolute.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from hf_sparsity.cli import prune
from hf_sparsity.cli.main import add_arguments, execute


class SparsifyCommand(BaseOptimumCLICommand):
    """Parses with the arguments of `hf-sparsity prune`, so that `--help` and mistakes speak of `optimum-cli`; then runs it."""

    COMMAND = CommandInfo(name="sparsify", help=prune.HELP)

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Adds the arguments of `hf-sparsity prune`."""
        parser.description = prune.HELP
        parser.set_defaults(command="prune")
        add_arguments(parser, "prune")

    def run(self) -> None:
        """Ends the process with the exit code of `hf-sparsity prune`."""
        sys.exit(execute(self.args))


REGISTER_COMMANDS = [SparsifyCommand]
