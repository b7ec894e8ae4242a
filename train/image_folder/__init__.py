"""A model of a folder of images: how large, how long, and the page of its run."""
