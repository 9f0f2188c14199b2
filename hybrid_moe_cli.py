"""Where ``hybrid-moe`` starts: outside the package, so that Ctrl-C while torch is imported leaves no traceback."""


def main() -> None:
    """Run the command line."""
    try:
        from hybrid_moe.cli import main as run
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run()
