"""``python -m hybrid_moe``: the command line."""

from .cli import main

main()
