"""The model card of a sparse folder."""
