"""The training loop over accelerate, and one recipe per stage.

Runs from the checkout; it is not in the wheel.
"""
