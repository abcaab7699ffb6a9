"""Check a sparse folder against its own claims."""
