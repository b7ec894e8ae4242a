"""Reinforcement learning: rollouts, rewards, advantages and policy losses, for text and pictures."""
