"""What all suites share: how hypothesis searches, and that Ctrl-C is not ignored."""

from __future__ import annotations

import os
import signal

from hypothesis import HealthCheck, settings

pytest_plugins = ["support.ways", "support.postgres_server", "support.ledgers"]

# No deadline: two cores are shared by all workers, and a time limit per example would test the machine.
# In CI the examples are the same each time, so that a change is judged by what it changes; by hand they are new ones.
settings.register_profile(
    "suite",
    deadline=None,
    print_blob=True,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("suite")

# A shell that runs the suite in the background has it ignore Ctrl-C, and so its children, of which some are sent one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
