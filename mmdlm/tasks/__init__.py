"""Domains of problems with answers that can be checked: rules, solvers and comparison."""
