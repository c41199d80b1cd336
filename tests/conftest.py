"""Fixtures of the whole suite: the devices of this machine."""

import pytest
import torch


def devices_present() -> list[torch.device]:
    """The host, and the accelerator if there is one that computes in float64, which the oracles need."""
    found = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        device = torch.device(accelerator.type, 0)
        try:
            torch.ones(1, dtype=torch.float64, device=device)
        except (RuntimeError, TypeError):  # there is no kernel, or MPS, which has no float64
            return found
        found.append(device)
    return found


@pytest.fixture(params=devices_present(), ids=str)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device of this machine."""
    return request.param
