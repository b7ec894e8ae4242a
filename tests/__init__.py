"""Tests, in the folders of the code that they are about.

A package, so that none of that name which another distribution installs stands before it.
"""
