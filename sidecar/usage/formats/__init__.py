"""Wire formats, without a vendor: framing, JSON, content encodings, WebSocket."""
