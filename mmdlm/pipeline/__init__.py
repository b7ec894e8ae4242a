"""The pipeline: load a model, and generate text and images with it."""
