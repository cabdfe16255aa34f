"""Facts that every part shares: frozen values, and pure rules about them. Imports nothing else of the sidecar."""
