"""Grouped GEMMs in plain Triton."""
