"""Checkpoints of a run: written whole, verified, and resumed exactly."""
