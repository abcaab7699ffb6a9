"""`python -m hf_sparsity` is the `hf-sparsity` command."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
