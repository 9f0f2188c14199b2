"""Measuring every candidate over the range of T, resumable: what `hybrid-moe regenerate` learns a policy from.

`plan` says what to measure next, `process` measures it in a process of its own, `gpu` is what runs there, `journal`
looks after the file, and `run` puts them together.
"""
