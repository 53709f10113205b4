"""The course's library: everything that its lessons build, small enough to read in an evening.

    models, instructions    load a chat model and the one-line requests it is studied with
    activations             read the residual stream
    interventions           erase a direction or add one, in a forward pass and throughout generation
    evaluation              refusal metric, judges, rates with intervals, skills, loss
    directions              difference in means, candidate scores, selection
    plots                   the pictures

Each module imports only those above it. Method: Arditi et al., "Refusal in Language Models Is Mediated by a Single
Direction", arXiv 2406.11717; a docstring's "paper" means this one.
"""
import os
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "data"  # beside `utils/`, wherever that stands

# Hugging Face's progress bars and advice would bury a lesson's own output. They are read when it is first imported.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
