"""What data jobs share: one writer at a time, the origin of inputs, reports of samples."""
