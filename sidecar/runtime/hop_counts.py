"""What only the hop can count, and how a process that serves keeps it until it tells the metering process.

The metering process has the same methods (`Metrics`): where one process does both, the hop counts there. Families and
labels are those of `metrics`, which writes them out.
"""

from __future__ import annotations


class HopEvents:
    """What only the hop can count: one method for each kind of happening, for whoever keeps the counts."""

    __slots__ = ()

    def count(self, name: str, text: str, count: float = 1) -> None:
        """One more of a family, under its label; "" for a family that has none, several with a tab between."""
        raise NotImplementedError

    def request_rejected(self, reason: str) -> None:
        """A request that never became a call: no request line, too long a head, and the like."""
        self.count("sidecar_rejected", reason)

    def upstream_retried(self) -> None:
        self.count("sidecar_upstream_retries", "")

    def upstream_failed(self, reason: str, upstream: str | None) -> None:
        """No connection, or one that ended, or what came was no response. `upstream`: its name; None: there is one."""
        self.count("sidecar_upstream_failures", reason)
        if upstream is not None:
            self.count("sidecar_upstream_faults", f"{upstream}\t{reason}")

    def not_recorded(self, route: str) -> None:
        """A call on a route that is not recorded."""
        self.count("sidecar_not_recorded", route)

    def redirected(self, what: str) -> None:
        """A response points to the upstream's own address: one of the words of `redirects`."""
        self.count("sidecar_upstream_redirects", what)

    def attribution_anomaly(self, kind: str) -> None:
        """A client said two things at once, or more than a record keeps."""
        self.count("sidecar_attribution_anomalies", kind)

    def usage_anomaly(self, kind: str) -> None:
        self.count("sidecar_usage_anomalies", kind)

    def limit_reached(self, name: str) -> None:
        self.count("sidecar_limits_reached", name)

    def lost(self, reason: str, count: int) -> None:
        self.count("sidecar_lost", reason, count)

    def released_uncommitted(self, count: int) -> None:
        self.count("sidecar_released_uncommitted", "", count)


class HopCounts(HopEvents):
    """The counts of a process that serves, kept until they are told (`take`)."""

    __slots__ = ("_counts", "connections", "drains")

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], float] = {}
        self.connections = 0  # open now
        self.drains = 0

    def count(self, name: str, text: str, count: float = 1) -> None:
        key = (name, text)
        self._counts[key] = self._counts.get(key, 0) + count

    def take(self) -> list[tuple[str, str, float]]:
        """What was counted since the last time: family, label, count."""
        if not self._counts:
            return []
        counts, self._counts = self._counts, {}
        return [(name, text, count) for (name, text), count in counts.items()]

    def connections_changed(self, delta: int) -> None:
        self.connections += delta

    def drains_changed(self, delta: int) -> None:
        self.drains += delta
