"""Rollouts of reinforcement learning: prompts, answers, rewards and what is learned from them."""
