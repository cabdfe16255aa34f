"""What all suites share: how hypothesis searches, and that Ctrl-C is not ignored."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["support.ways", "support.postgres_server", "support.ledgers", "support.lanes"]

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


@pytest.fixture(autouse=True)
def _logs_of_a_command_end_with_its_test() -> Iterator[None]:
    """A command that a test runs in this process sets up logging for all of it, onto a stream that the test closes."""
    root = logging.getLogger()
    before = {name: logging.getLogger(name).level for name in (None, "sidecar", "aiohttp")}
    handlers = [one for one in root.handlers if type(one) is logging.StreamHandler]
    yield
    for one in root.handlers[:]:
        if type(one) is logging.StreamHandler and one not in handlers:
            root.removeHandler(one)
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


# A shell that runs the suite in the background has it ignore Ctrl-C, and so its children, of which some are sent one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
