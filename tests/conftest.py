import functools

import pytest
from tiny_models import ARCHITECTURES, save_tiny

from utils.models import load_model


def pytest_configure(config):
    """pytest resets the filters of warnings, so this one of utils.models is repeated here."""
    config.addinivalue_line("filterwarnings", "ignore:.*was never reached. the loop asked for a step")


@pytest.fixture(scope="session")
def load_tiny(tmp_path_factory):
    """Load a tiny random model by its architecture; each is made once."""
    @functools.cache
    def load(architecture):
        return load_model(save_tiny(tmp_path_factory.mktemp(architecture), architecture))
    return load


@pytest.fixture(params=ARCHITECTURES)
def model(request, load_tiny):
    """A tiny random model, of each architecture in turn."""
    return load_tiny(request.param)


@pytest.fixture
def llama(load_tiny):
    return load_tiny("llama")
