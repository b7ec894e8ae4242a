"""The training objectives: timesteps, weights, token losses and their normalization."""
