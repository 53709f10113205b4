"""A stand-in for NDIF: a process that has nnsight and a model, and nothing of the course.

    python -I tests/ndif_stand_in.py

Does with a request what NDIF's model server does: builds the model from its key, deserializes the traced block, runs
it, and sends back what the block saved. A request comes on stdin, an answer goes to stdout, each pickled:
(metadata, blob) -> (True, result) or (False, what went wrong).
"""
import io
import linecache
import pickle
import sys
import traceback
from functools import cache
from pathlib import Path

import torch
import zstandard
from nnsight.modeling.huggingface import HuggingFaceModel
from nnsight.schema.request import RequestModel
from nnsight.tracing.globals import BLOCKS, SOURCES
from nnsight.tracing.tracer import _saves, dec, inc

COURSE = str(Path(__file__).resolve().parent.parent / "utils")


class NoCourse:
    """An import hook that knows of no `utils`, wherever it may be installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "utils":
            raise ModuleNotFoundError(f"No module named {name!r}")


def keep_closed(event, args):
    """An audit hook: no file of the course is read, not even for the source of a function."""
    if event == "open" and str(args[0]).startswith(COURSE):
        raise PermissionError(f"{args[0]} is not on this machine")


@cache
def model_of(key):
    model = HuggingFaceModel.from_model_key(key, dispatch=True, dtype=torch.float32, device="cpu")
    model._module.requires_grad_(False)
    return model


def run(metadata, blob):
    """The values that the request saved, as bytes."""
    request = RequestModel.model_validate_json(metadata)
    model = model_of(request.model_key)
    model._remoteable_set_env(request.env)
    for memory in (linecache.cache, SOURCES, BLOCKS):  # no request sees the code of another
        memory.clear()
    tracer = RequestModel.deserialize(blob, model._remoteable_persistent_objects(), compress=request.compress)
    inc()
    try:
        tracer.execute(tracer.info.code)
        saved = {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in _saves()}
    finally:
        dec()
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return zstandard.compress(buffer.getvalue()) if request.compress else buffer.getvalue()


def main():
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # nothing that is printed gets among the answers
    sys.meta_path.insert(0, NoCourse())
    sys.addaudithook(keep_closed)
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = True, run(*request)
        except Exception:
            answer = False, traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
