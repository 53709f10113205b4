import functools

import pytest
import torch
from exact import Float64
from hypothesis import settings
from tiny_models import ARCHITECTURES, save_tiny

from utils.models import load_model

# How many random inputs a property is tried on. `make test` tries the same ones each time, `make test-all` others too.
settings.register_profile("fast", max_examples=15, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=300, deadline=None)
settings.load_profile("fast")

# Of each kind of family one, for the fast tests. Llama is the plain one; Qwen 2 has biases on what attention reads;
# Gemma 2 has norms behind what is written, and a window; GPT-NeoX has other names, and biases everywhere.
KINDS = ("llama", "qwen2", "gemma2", "gpt_neox")


def pytest_configure(config):
    """pytest resets the filters of warnings, so this one of utils.models is repeated here."""
    config.addinivalue_line("filterwarnings", "ignore:.*was never reached. the loop asked for a step")


@pytest.fixture(scope="session")
def load_tiny(tmp_path_factory):
    """Load a tiny random model by its architecture, in float64; each is made once."""
    @functools.cache
    def load(architecture):
        return load_model(save_tiny(tmp_path_factory.mktemp(architecture), architecture), dtype=torch.float64)
    return load


@pytest.fixture
def exact():
    """In this test no rounding decides: all is computed in float64."""
    with Float64():
        yield


@pytest.fixture(params=[pytest.param(name, marks=[] if name in KINDS else pytest.mark.slow) for name in ARCHITECTURES])
def model(request, load_tiny, exact):
    """A tiny random model, of each architecture in turn."""
    return load_tiny(request.param)


@pytest.fixture
def llama(load_tiny, exact):
    return load_tiny("llama")
