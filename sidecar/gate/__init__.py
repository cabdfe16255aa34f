"""The gate: may this call be made, and what its client is told where it may not."""
