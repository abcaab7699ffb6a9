"""Running packed models: products with packed weights, the modules that hold them, and loading without unpacking."""
