"""How long updates and generation take on a GPU."""
