"""The typed recipe, and the words that change it."""
