"""Checkpoint folders: their tensors, and the conversion of autoregressive models."""
