"""Images: their pixels, and the tokenizers that turn them into codes and back."""
