"""Plugins for serving frameworks, found by entry points; only these modules import their framework."""
