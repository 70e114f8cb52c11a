from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No test of this folder may reach the Hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
