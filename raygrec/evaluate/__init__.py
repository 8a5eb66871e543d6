"""Full ranking, metrics, baselines and tables."""
