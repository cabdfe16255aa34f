"""What all suites share: how hypothesis searches."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# No deadline: two cores are shared by all workers, and a time limit per example would test the machine.
settings.register_profile("suite", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")
