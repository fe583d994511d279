"""The device that these tests run on, and the marker that keeps them apart: `make test-device`."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.device)


@pytest.fixture(autouse=True, scope="session")
def device() -> str:
    """The device's name, once it is there."""
    from device import host_device

    host_device.install()
    return host_device.NAME


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    from device import host_device

    if host_device.COUNTED:
        terminalreporter.section("operators and waits of a step, each of its budget")
        for line in host_device.COUNTED:
            terminalreporter.write_line(line)
