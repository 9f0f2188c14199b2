"""The formats of flashinfer-bench: traces, definitions and Solutions."""
