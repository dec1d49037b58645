"""The paper's sizes: each has the parameters its name says, in every variant."""

import pytest

from pytitans.models import TitansConfig
from pytitans.models.configuration_titans import VARIANTS
from pytitans.presets import PAPER_SIZES, count_parameters, model_preset, paper_config


@pytest.mark.parametrize("size", PAPER_SIZES)
def test_a_size_has_the_parameters_of_its_name(size):
    for variant in VARIANTS:
        config = paper_config(size, variant)
        assert count_parameters(config) == pytest.approx(PAPER_SIZES[size].parameters, rel=0.02)


def test_what_is_given_is_kept():
    config = paper_config("170M", window=64, intermediate_size=256)
    assert (config.window, config.intermediate_size, config.hidden_size) == (64, 256, 768)


def test_a_preset_makes_its_configuration():
    assert (
        TitansConfig(**model_preset("340m", "mag")).to_dict()
        == paper_config("340m", "mag").to_dict()
    )


def test_an_unknown_size_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'2b' is unknown: choose one of 170m, 340m"):
        paper_config("2b")
