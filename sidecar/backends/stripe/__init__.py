"""Stripe: the backend, its meters, its late complaints, and the session of its event stream."""
