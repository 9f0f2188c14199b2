"""Workloads, timing, the correctness gate and the records that come of them."""
