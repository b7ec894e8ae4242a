"""The sampler: order, unmasking, guidance, caches and remasking."""
