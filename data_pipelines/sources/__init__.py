"""Where samples come from, and how each becomes a Sequence: one file per source."""
