"""Images measured: distances to real ones, fit to prompts, and layouts of published benchmarks."""
