"""Revenium: the backend, the forms of its interfaces, and its product-key check."""
