"""Rewards for answers in text: numbers, mathematics, puzzles and their form."""
