"""Decide how sparse each layer should be."""
