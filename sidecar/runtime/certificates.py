"""Whether the certificates that the settings name can be used: told before anything is opened, and by `check`."""

from __future__ import annotations

import ssl
from pathlib import Path

from sidecar.proxy import tls
from sidecar.proxy.tls import load_chain, why_unreadable
from sidecar.settings import ProxySettings, Settings


def faults(settings: ProxySettings) -> list[str]:
    """What is wrong with them, each by the name of its setting."""
    found = []
    for prefix, cert, key in (
        ("SIDECAR_TLS", settings.tls_cert_file, settings.tls_key_file),
        ("SIDECAR_UPSTREAM", settings.upstream_cert_file, settings.upstream_key_file),
    ):
        # One of the two alone is a fault that the settings tell themselves.
        if cert is not None and key is not None and (why := _chain_fault(cert, key)) is not None:
            found.append(f"{prefix}_CERT_FILE and {prefix}_KEY_FILE: {why}")
    if settings.upstream_ca_file is not None:
        try:
            ssl.create_default_context(cafile=settings.upstream_ca_file)
        except OSError as error:
            found.append(f"SIDECAR_UPSTREAM_CA_FILE: expected certificates (PEM): {why_unreadable(error)}")
    return found


def keep(settings: Settings) -> None:
    """For the processes that serve, which may be started again when a file is broken (`proxy.tls`)."""
    shown = tls.of_listener(settings.proxy)
    named = [tls.of_named(one) for one in settings.proxy.upstreams]
    tls.keep([*([] if shown is None else [shown]), tls.of_upstream(settings.proxy), *named])


def _chain_fault(cert: Path, key: Path) -> str | None:
    try:
        load_chain(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), cert, key)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"expected a certificate chain and its key (PEM): {why_unreadable(error)}"
    return None
