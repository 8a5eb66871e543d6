"""The training loop and the one file that knows DeepSpeed; no Ray here."""
