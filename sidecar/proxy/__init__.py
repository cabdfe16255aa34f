"""The hop: calls come in, go to the upstream untouched, and leave one exchange each.

Reading order: `config` (what it is told), `headers` and `response_parser` (pure), `upstream` and `client_connection`
(one connection each), `call` (one exchange between the two; docs/call.md draws it), `ending` (what its end means),
`server` (the whole).
"""

from sidecar.model.http_url import UpstreamAddress
from sidecar.proxy.context import Attribute, ProxyMetrics, Route
from sidecar.proxy.server import Proxy

__all__ = ["Attribute", "Proxy", "ProxyMetrics", "Route", "UpstreamAddress"]
