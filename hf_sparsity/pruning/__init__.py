"""Carry out a plan, block by block."""
