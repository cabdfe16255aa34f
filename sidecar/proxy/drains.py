"""Who may have responses read on after leaving, and how many: a fixed number of slots, shared fairly.

Each slot holds an upstream connection for the sake of the usage in what is still to come, so there is an end to them;
and whoever could fill them all would make everybody's calls free of charge. So one subscriber, or one client's address
where no subscriber is known, gets at most a quarter of them, and one address at most half, whatever subscribers it
names. What finds no slot is counted, said in the log, and its record says why nothing is known.
"""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address
from typing import Final

from sidecar.model.exchange import Subscriber

SHARE: Final = 4  # one subscriber gets a quarter
ADDRESS_SHARE: Final = 2  # one address gets half: behind it may be a gateway with many subscribers
IPV6_NETWORK_BITS: Final = 64  # what one customer of a provider is given

ALL: Final = "drains"  # the limits by name
OWN: Final = "drains_share"
REASONS: Final = {
    ALL: "the client left, and all drain slots were taken",
    OWN: "the client left, and its share of the drain slots was taken",
}


class Drains:
    """The slots that are taken, and by whom."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.taken = 0
        self._share = max(1, slots // SHARE)
        self._address_share = max(1, slots // ADDRESS_SHARE)
        self._held: dict[str, int] = {}

    def owners(self, subscriber: Subscriber | None, client_ip: str | None) -> tuple[tuple[str, int], ...]:
        """On whose account a slot goes, and how many each may have."""
        address = _network(client_ip)
        if subscriber is None:
            return ((f"address {address}", self._share),)
        owner = (f"subscriber {subscriber.id}", self._share)
        # A Unix socket tells no address: behind it is a gateway, with as many subscribers as there are.
        return (owner,) if client_ip is None else (owner, (f"address {address}", self._address_share))

    def take(self, owners: tuple[tuple[str, int], ...]) -> str | None:
        """Take a slot; else the limit that was reached, and nothing is taken."""
        held = self._held
        if self.taken >= self.slots:
            return ALL
        if any(held.get(owner, 0) >= most for owner, most in owners):
            return OWN
        self.taken += 1
        for owner, _ in owners:
            held[owner] = held.get(owner, 0) + 1
        return None

    def give_back(self, owners: tuple[tuple[str, int], ...]) -> None:
        self.taken -= 1
        for owner, _ in owners:
            left = self._held[owner] - 1
            if left:
                self._held[owner] = left
            else:
                del self._held[owner]


def _network(client_ip: str | None) -> str:
    """The address; of IPv6 the network, in which one client has more addresses than there are slots."""
    if client_ip is None:
        return "unknown"
    address = ip_address(client_ip)
    if isinstance(address, IPv6Address):
        return f"{IPv6Address(int(address) >> IPV6_NETWORK_BITS << IPV6_NETWORK_BITS)}/{IPV6_NETWORK_BITS}"
    return client_ip
