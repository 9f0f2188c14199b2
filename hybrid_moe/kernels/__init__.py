"""Triton kernels of the fused pipeline, one module for each step."""
