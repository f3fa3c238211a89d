from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Models this small lose time waiting for threads."""
    import torch

    torch.set_num_threads(1)
