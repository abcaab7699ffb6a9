"""The packed layout: one bit a weight and the kept values, as bytes."""
