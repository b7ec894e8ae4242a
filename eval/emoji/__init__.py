"""The emoji benchmark: drawing, captions, edits, questions and reconstructions."""
