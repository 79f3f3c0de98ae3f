"""Precision: what is worked out as it stands, whatever autocast makes of products around it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def exactly(device: torch.device) -> AbstractContextManager[Any]:
    """Around what must not be rounded; a device without autocast needs nothing."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
