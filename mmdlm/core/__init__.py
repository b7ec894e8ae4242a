"""The mathematics, on ids and tensors alone: imports torch, einops and nothing else of ours."""
