"""Checks of the exercises on checkpoints: what their weights take."""
import torch

from utils import checkpoints
from utils.checks import register

register(
    checkpoints.memory_needed,
    cases=lambda: [(1_000_000, torch.float32), (3_000, torch.bfloat16)],
    mistakes={
        "these are bits. A byte has eight of them, and `itemsize` counts bytes.":
            lambda n_weights, dtype: 8 * n_weights * dtype.itemsize,
        "each weight takes 4 bytes in your answer, whatever the dtype. `dtype.itemsize` says how many.":
            lambda n_weights, dtype: 4 * n_weights,
        "each weight takes 2 bytes in your answer, whatever the dtype. `dtype.itemsize` says how many.":
            lambda n_weights, dtype: 2 * n_weights,
        "these are gigabytes. Return bytes.":
            lambda n_weights, dtype: n_weights * dtype.itemsize / 1e9,
        "these are gibibytes, of 2 to the 30 bytes. Return bytes.":
            lambda n_weights, dtype: n_weights * dtype.itemsize / 2**30,
        "this is what one weight takes. There are n_weights of them.":
            lambda n_weights, dtype: dtype.itemsize,
    },
)
