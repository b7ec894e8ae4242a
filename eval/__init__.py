"""Pure metrics, and one file per benchmark.

Runs from the checkout; it is not in the wheel.
"""
