"""The speed benchmark of sampling and training."""
