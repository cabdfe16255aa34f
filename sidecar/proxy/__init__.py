"""The hop: calls come in, go to the upstream untouched, and leave one exchange each.

Reading order: `rules` (what it is told), `headers` and `answer` (pure), `upstream` and `client` (one
connection each), `call` (one exchange between the two), `ending` (its end), `proxy` (the whole).
"""

from sidecar.proxy.hop import Attribute, ProxyMetrics, Route
from sidecar.proxy.proxy import Proxy
from sidecar.proxy.rules import ProxyRules, UpstreamAddress

__all__ = ["Attribute", "Proxy", "ProxyMetrics", "ProxyRules", "Route", "UpstreamAddress"]
