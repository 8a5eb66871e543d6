"""Graph encoders over the training interactions."""
