"""Fast matrix products for small batches on a CPU."""
