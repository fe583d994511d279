"""All runs as a table, read without torch."""
