"""Policies: their schema, where they are found, and the choice that they make."""
