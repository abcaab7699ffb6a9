"""Perplexity, divergence from the dense model, certificates, tasks, and their record."""
