"""The hop: calls come in, go to the upstream untouched, and leave one exchange each.

Reading order: `rules` (what it is told), `headers` and `answer` (pure), `upstream` and `client` (one
connection each), `call` (one exchange between the two), `ending` (its end), `proxy` (the whole).
"""

from sidecar.model.http_url import UpstreamAddress
from sidecar.proxy.config import ProxyRules
from sidecar.proxy.context import Attribute, ProxyMetrics, Route
from sidecar.proxy.server import Proxy

__all__ = ["Attribute", "Proxy", "ProxyMetrics", "ProxyRules", "Route", "UpstreamAddress"]
