"""Tar shards: read, write, shuffle, mix, batch and resume."""
