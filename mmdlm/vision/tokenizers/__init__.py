"""Image tokenizers: images to codes and back."""
