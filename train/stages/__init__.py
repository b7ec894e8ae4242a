"""What the recipes share: data, model, stage, samples and measures."""
