"""The simulated GPU, which only runs that ask for it load."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def cuda() -> Iterator[Any]:
    import simulated

    simulated.believed()
    with simulated.Simulated():
        yield simulated
