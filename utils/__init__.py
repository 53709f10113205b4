"""The course's library: all that its lessons build, small enough to read in an evening.

    world           how the organism's requests are asked and answered, and its exact judge
    instructions    the one-line requests that a model is studied with
    formats         GGUF files and adapters, made into plain weights
    checkpoints     find a model's files by its name, and read its weights
    templates       what a chat template makes of a request
    models          load a chat model; its tokens, template and layers, the same on every architecture
    activations     read the residual stream
    interventions   erase a direction or add one: in a forward pass, throughout generation, or in the weights
    evaluation      refusal metric, judges, rates with intervals, skills, loss
    probes          linear probes, the words-only baseline, labels for controls
    candidates      scores of candidate directions: exact ones, and estimates of all at once
    directions      difference in means, selection, the whole method
    runs            what models of real weights did, as it was recorded
    suffixes        the search for adversarial suffixes
    plots           the pictures
    widgets         controls to play with
    reproduce       the whole experiment on one model, by one command

Each imports only those above it. The method is that of Arditi et al., "Refusal in Language Models Is
Mediated by a Single Direction", arXiv 2406.11717, which the docstrings call "the paper".
"""
import hashlib
import json
import sys
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "data"  # beside `utils/`, wherever that stands


def say(text):
    """Print a line, also where the console lacks some of its letters, as in the name of a folder."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding))


def fingerprint(content):
    """A short text that stands for content of any kind that has a faithful `repr`: other content, another text."""
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def differences(one, two):
    """The names under which two dicts hold different things, for a sentence."""
    return ", ".join(name for name in {**one, **two} if one.get(name) != two.get(name))


def write_json(path, content):
    """Write a JSON file that is there whole, or not at all, whenever this is interrupted."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)
