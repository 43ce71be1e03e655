"""Which cached tokens are recomputed: one strategy a file."""
