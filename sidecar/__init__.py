"""Metering sidecar: forwards every call untouched, leaves one durable record, bills each record once."""

__version__ = "0.1.0"
