"""From raw interaction files to a memory-mapped store."""
