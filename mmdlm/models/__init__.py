"""The Transformer, and one file per published family."""
