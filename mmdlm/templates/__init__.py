"""How each family lays out its tasks: chat templates, special ids, pictures between words."""
