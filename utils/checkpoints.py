"""Find a checkpoint by its name and read its weights: where they lie, on which device, in which precision."""
import json
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from huggingface_hub.errors import GatedRepoError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, logging
from transformers.utils import cached_file, is_accelerate_available

from utils import DATA

ORGANISM = DATA / "organism"

SMALLER = 'choose a smaller model, close other programs, or try device="auto" (all GPUs) or remote=True (NDIF).'

# Progress bars and advice would bury a lesson's own output.
logging.set_verbosity_error()
logging.disable_progress_bar()


def locate(name):
    """The folder, or else the hub id, that a name stands for."""
    folder = Path(name).expanduser()
    if name == "organism":
        folder = ORGANISM / "chat"
    elif name == "helpful_only" or name.startswith("tuning/"):
        folder = ORGANISM / name
    elif not folder.is_dir() and name.count("/") == 1 and name[0] not in "./~":
        return name
    if not (folder / "config.json").is_file():
        steps = sorted((f"tuning/{step.name}" for step in (ORGANISM / "tuning").glob("*")),
                       key=lambda step: (len(step), step))
        raise FileNotFoundError(
            f"There is no model {name!r} ({folder}): choose {', '.join(['organism', 'helpful_only', *steps])}, "
            "a folder, or a hub id (owner/name); `make model` builds the course's own.")
    return str(folder)


def file_of(source, filename):
    """The path of a file of a checkpoint, which a folder or a hub id stands for; None if it has no such file."""
    path = cached_file(source, filename, _raise_exceptions_for_missing_entries=False,
                       _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_connection_errors=False)
    return path and Path(path)


def world_of(source):
    """The world that a checkpoint speaks of, by its course.json: "organism", or None for any other chat model.

    What follows from it: the exact judge holds, a suffix may be searched for, and the weights, few as they are, run in
    float32 on the CPU, without a word. Raises ValueError for a course.json that says something else.
    """
    file = file_of(source, "course.json")
    content = json.loads(file.read_text(encoding="utf-8")) if file else {"world": None}
    if content not in ({"world": None}, {"world": "organism"}):
        raise ValueError(f"{file} names no world of the course ({content}): restore it, or delete it.")
    return content["world"]


def read_weights(name, source, dtype, device, own=False, note=""):
    """The transformers model, its weights where they are to be. One line says what was chosen, with a note.

    own: True for a model of the course's world, of which nothing is said.
    """
    config = read(name, AutoConfig.from_pretrained, source)
    n_weights = read(name, n_parameters, config)
    devices = devices_of(device or ("cpu" if own else best_device()))
    dtype = dtype or (torch.float32 if own else best_dtype(n_weights, config.dtype, devices[0]))
    size, free, place = memory_needed(n_weights, dtype), sum(map(memory_free, devices)), ", ".join(map(str, devices))
    if size > free:
        raise MemoryError(f"{name!r} takes {size / 1e9:.1f} GB in {short(dtype)}, and {free / 1e9:.1f} GB are free on "
                          f"{place}: {SMALLER}")
    if not own:
        print(f"{name}: {n_weights / 1e6:,.3g} million weights, {size / 1e9:.2g} GB in {short(dtype)} on "
              f"{place}{note}")
    with progress_bars(shown=not own):
        module, report = read(name, AutoModelForCausalLM.from_pretrained, source, dtype=dtype,
                              device_map="auto" if len(devices) > 1 else None,
                              attn_implementation="eager",  # the only one that gives attention's patterns
                              # the only one that knows float64
                              experts_implementation="eager" if dtype == torch.float64 else None,
                              output_loading_info=True)
    if report["missing_keys"]:
        raise OSError(f"The weights of {name!r} lack {min(report['missing_keys'])}: "
                      "restore or download them again.")
    if len(devices) == 1:
        module.to(devices[0])
    elif not {weight.device for weight in module.parameters()} <= set(devices):
        raise MemoryError(f"Only a part of {name!r} fits on {place}: {SMALLER}")
    return module.requires_grad_(False)  # no graph is built unless an input asks for gradients


def best_device():
    """The GPU, if there is one ("cuda" or "mps"), or else the CPU."""
    gpu = torch.accelerator.current_accelerator(check_available=True)
    return gpu.type if gpu else "cpu"


def devices_of(device):
    """What a model is loaded on, a list of torch devices: one, or with "auto" all GPUs, where there are several.

    Raises ValueError for a device that is not here, ImportError without `accelerate`, which spreads a model over GPUs.
    """
    gpus = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    if device != "auto" or len(gpus) < 2:
        return [_device(best_device() if device == "auto" else device)]
    if not is_accelerate_available():
        raise ImportError('A model is spread over several GPUs with the library "accelerate": pip install accelerate.')
    return gpus


def _device(name):
    """The torch device of this name, if it is one and is here."""
    counts = {best_device(): torch.accelerator.device_count(), "cpu": 1}
    try:
        device = torch.device(name)
    except RuntimeError:  # no device at all, such as "gpu"
        device = torch.device("meta")
    if (device.index or 0) >= counts.get(device.type, 0):
        here = [f"{kind}:{number}" for kind, n in counts.items() if kind != "cpu" for number in range(n)]
        raise ValueError(f"There is no device {str(name)!r} here: choose {', '.join(['cpu', *here])} or auto.")
    return device


def best_dtype(n_weights, stored, device):
    """Full precision on a CPU whose memory holds it; or else that of the stored weights, if it is known."""
    if device.type == "cpu" and memory_needed(n_weights, torch.float32) < memory_free(device):
        return torch.float32
    return stored or torch.float32


def n_parameters(config):
    """How many weights a model of this transformers config has. None is made."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def memory_needed(n_weights, dtype):
    """Bytes that the weights take. What is computed with them comes on top: little, beside a large model."""
    return n_weights * dtype.itemsize


def memory_free(device):
    """Bytes that are free on a device; mps shares the CPU's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def read(name, load, source, **options):
    """`load(source, **options)`, the many errors of transformers told in a sentence."""
    try:
        return load(source, **options)
    except SafetensorError as error:
        raise OSError(f"The weights of {name!r} are damaged ({error}): "
                      "restore or download them again.") from error
    except RuntimeError as error:
        if "mismatched_sizes" not in str(error):
            raise
        raise OSError(f"The weights of {name!r} have not the shapes that its config.json says: "
                      "restore or download both again.") from error
    except (OSError, ValueError) as error:
        if isinstance(error.__cause__, GatedRepoError):
            raise OSError(f"{name!r} is gated: accept its licence at https://huggingface.co/{source}, then run "
                          "`hf auth login` with a token of that account, and load it again.") from error
        raise OSError(f"{name!r} could not be loaded ({reason(error)}): check the spelling, that the folder is whole "
                      "or the hub is in reach, and `hf auth login` if there is a licence to accept.") from error


def reason(error):
    """The first line of an error's message, to stand within a sentence; its kind, if it says nothing."""
    return str(error).strip().split("\n")[0].rstrip(".: ") or type(error).__name__


@contextmanager
def progress_bars(shown):
    """Within the block, downloads and the reading of weights show their progress, or do not."""
    if shown:
        logging.enable_progress_bar()
    try:
        yield
    finally:
        logging.disable_progress_bar()


def short(dtype):
    return str(dtype).removeprefix("torch.")
