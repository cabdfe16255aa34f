"""Rewriting of heads: what a proxy must change, and nothing else.

Fields are passed on as the bytes they came in, in their order and case. Changed are: hop-by-hop
fields (and those that `Connection` names), framing, `Host`, and what tells the upstream about the
client. No I/O, no clock; every function is a table test away.

One pass over the fields decides and builds at once, because it is done for every call; a second pass
is made only where `Connection` names fields to drop.
"""

from __future__ import annotations

from sidecar.proxy.headers.kinds import NAMES_KEPT_MAX
from sidecar.proxy.headers.request import RequestHead
from sidecar.proxy.headers.response import ResponseHead
from sidecar.proxy.headers.rewriting import METER_ID, HeaderRules, Peer, trace_id

__all__ = ["METER_ID", "NAMES_KEPT_MAX", "HeaderRules", "Peer", "RequestHead", "ResponseHead", "trace_id"]
