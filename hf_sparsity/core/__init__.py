"""Formulas as functions of tensors; imports torch and nothing else."""
