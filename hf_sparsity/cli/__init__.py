"""The `hf-sparsity` command."""
