"""For developers and the demo: stand-ins for model APIs and billing backends, and the demo itself."""
