"""A transformers model: its blocks and weights, offloading, evaluation mode, fingerprints, zeros, loading."""
