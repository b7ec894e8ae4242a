"""Published families: config.json and weight names in their format and in ours."""
