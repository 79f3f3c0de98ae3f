"""Precision: exact computation inside autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def exactly(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast, for values that must not be rounded."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()  # this device has no autocast
