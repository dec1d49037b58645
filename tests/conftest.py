"""Fixtures: a tiny model of each variant and tokens for it."""

import pytest
import torch
from tiny import VARIANTS, tiny_model

from pytitans.models import TitansForCausalLM


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    return request.param


@pytest.fixture
def model(variant) -> TitansForCausalLM:
    return tiny_model(variant)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(16, (3, 37), generator=torch.Generator().manual_seed(1))
