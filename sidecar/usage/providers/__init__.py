"""The vendors: how each one states usage, and the table of where."""
