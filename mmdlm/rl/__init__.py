"""Reinforcement learning: rollouts, rewards, advantages, policy losses; for text and images."""
