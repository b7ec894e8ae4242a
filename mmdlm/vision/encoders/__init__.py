"""The vision adapter: tower, projector, pooling and tiling of images."""
