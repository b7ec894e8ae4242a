"""The mathematics, only on ids and tensors: imports torch, einops and nothing else of ours."""
