"""The two grouped GEMMs of the experts, one module for each provider."""
