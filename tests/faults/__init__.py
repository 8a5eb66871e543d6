"""The fault matrix: faults that really happen to runs on real local Ray nodes, each beside a run that had none."""
