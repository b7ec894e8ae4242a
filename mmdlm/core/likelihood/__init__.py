"""Estimators of log p(target given context) for reinforcement learning and evaluation."""
