"""Rewards for code, which runs with its tests in a sandbox."""
