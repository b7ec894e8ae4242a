"""How each family lays out its tasks: chat templates, special ids, images between words."""
