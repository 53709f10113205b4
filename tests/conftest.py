import functools

import pytest
import torch
from exact import Float64
from hypothesis import settings
from tiny_models import ARCHITECTURES, EXPERTS, HYBRIDS, save_tiny

from utils.models import load_model

# How many random inputs a property is tried on. `make test` tries the same ones each time, `make test-all` others too.
settings.register_profile("fast", max_examples=15, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=300, deadline=None)
settings.load_profile("fast")

# Of each kind of family one, for the fast tests. Llama is the plain one; Gemma 2 has norms behind what is written, and
# a window; GPT-NeoX has other names, and biases everywhere; Granite multiplies what is written; Qwen 3 MoE has experts;
# most layers of LFM 2 have no attention.
KINDS = ("llama", "gemma2", "gpt_neox", "granite", "qwen3_moe", "lfm2")


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


def families(leaving_out=()):
    return [pytest.param(name, marks=[] if name in KINDS else pytest.mark.slow) for name in ARCHITECTURES
            if name not in leaving_out]


@pytest.fixture(params=families())
def model(request, load_tiny, exact):
    """A tiny random model, of each architecture in turn."""
    return load_tiny(request.param)


@pytest.fixture(params=families(leaving_out=EXPERTS))
def editable(request, load_tiny, exact):
    """The same, without those whose weights cannot be edited."""
    return load_tiny(request.param)


@pytest.fixture(params=families(leaving_out=HYBRIDS))
def attentive(request, load_tiny, exact):
    """The same, without those whose layers do not all have attention."""
    return load_tiny(request.param)


@pytest.fixture
def llama(load_tiny, exact):
    return load_tiny("llama")
