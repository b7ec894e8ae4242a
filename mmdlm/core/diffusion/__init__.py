"""The forward process: mask schedules, and the noise that replaces tokens."""
