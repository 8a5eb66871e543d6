"""Top-k lists from a finished run."""
