"""Rewards for images: CLIP, ImageReward, the nearest name and the round trip."""
