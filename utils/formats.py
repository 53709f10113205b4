"""What is not an ordinary checkpoint, made into one: GGUF files, and adapters."""
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from importlib import import_module
from math import prod

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# The name of a part of a model that was split; a model in one part is whole.
SHARD = re.compile(r"-\d{5}-of-(?!00001\.)\d{5}\.gguf$", re.IGNORECASE)
# GGUF's names for ways to cut text into words before it becomes tokens: those that set each digit apart.
DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"}


@dataclass(frozen=True)
class Gguf:
    """A GGUF file, without its weights.

    file: its name within the checkpoint. family: "llama", say. settings: {name: number or text}, without the family's
    name. quantization: "Q4_K_M", say. n_weights: how many it holds. turns: what its rope_freqs.weight divides the
    frequencies of RoPE by, [head_dim / 2], as Llama has them from 3.1 on; else None.
    """
    file: str
    family: str
    settings: dict
    quantization: str
    n_weights: int
    turns: torch.Tensor | None

    @property
    def dtype(self):
        """The precision that loses nothing of these weights, or less than their quantization did."""
        return {"F32": torch.float32, "F16": torch.float16}.get(self.quantization, torch.bfloat16)


def read_gguf(name, path, file):
    """The Gguf at a path, for the model of this name.

    Raises ImportError without the libraries that read it, OSError for a damaged file, ValueError for a file that is
    only a part of a model.
    """
    library(name, "gguf", "a GGUF file is read")
    library(name, "accelerate", "a GGUF file is read")
    from gguf import GGUFReader, GGUFValueType, LlamaFileType, dequantize
    try:
        reader = GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()
                  if field.types and field.types[0] != GGUFValueType.ARRAY}
        family = fields["general.architecture"]
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise OSError(f"The file of {name!r} is no whole GGUF file (its head or its end is missing): restore or "
                      "download it again.") from error
    if fields.get("split.count", 1) > 1 or SHARD.search(file):
        raise ValueError(f"{name!r} is one part of a model that was split into several GGUF files: join them "
                         "(`llama-gguf-split --merge`), or take a file that holds the whole model.")
    if "tokenizer.ggml.tokens" not in reader.fields:
        raise ValueError(f"{name!r} is a GGUF file that holds no tokenizer, as one for images or an adapter: take the "
                         "file of the language model.")
    settings = {key.removeprefix(f"{family}."): value for key, value in fields.items()}
    blocks = fields.get(f"{family}.block_count", 0) - fields.get(f"{family}.nextn_predict_layers", 0)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    factors = tensors.pop("rope_freqs.weight", None)
    # Layers that guess the tokens after the next one come last, and are no part of the model proper.
    sizes = {key: prod(map(int, tensor.shape)) for key, tensor in tensors.items()
             if int((re.match(r"blk\.(\d+)\.", key) or [0, -1])[1]) < blocks}
    types = Counter()
    for key in sizes:
        types[tensors[key].tensor_type.name] += sizes[key]
    known = {kind.value: kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in LlamaFileType}
    return Gguf(file, family, settings, known.get(fields.get("general.file_type")) or types.most_common(1)[0][0],
                sum(sizes.values()),
                None if factors is None else torch.tensor(dequantize(factors.data, factors.tensor_type)))


def complete_config(name, config, gguf):
    """Write into a transformers config what transformers leaves out of a GGUF file's settings.

    Raises ValueError for a setting that changes what the model computes, and that is not understood here, and for a
    family that has no rotary positions (RoPE), as GPT-2.
    """
    if not getattr(config, "rope_parameters", None):
        raise ValueError(f"{name!r} is a GGUF file of the family {gguf.family!r}, which the course does not read from "
                         "GGUF: take the model's own folder or hub id.")
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    scaling, width = gguf.settings.get("rope.scaling.type", "none"), gguf.settings.get("attention.key_length")
    if width and getattr(config, "head_dim", None) and "global_head_dim" not in config:
        config.head_dim = width
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if gguf.family in ("gemma2", "gemma3") and config.num_hidden_layers in (46, 62):  # the 27B models
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
    if gguf.turns is not None:
        rope.update(rope_type="llama3", factor=gguf.turns.max().item(), low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position_embeddings=8192)
        slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
        plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
        understood = slowed.shape == gguf.turns.shape and torch.allclose(slowed * gguf.turns, plain, rtol=1e-3)
    elif scaling == "linear":
        rope.update(rope_type="linear", factor=gguf.settings["rope.scaling.factor"])
        understood = True
    else:
        understood = scaling == "none" or rope["rope_type"] == scaling
    turned = gguf.settings.get("rope.dimension_count", head_dim)
    if not understood or turned != head_dim * rope.get("partial_rotary_factor", 1):
        raise ValueError(f"{name!r} is a GGUF file whose positions (RoPE) are scaled in a way that is not read from "
                         "GGUF: take the model's own folder or hub id.")


def gguf_options(gguf):
    """What transformers is to be told when it loads the weights of a GGUF file: dequantize them all.

    Versions that cannot keep them quantized have no setting for it.
    """
    settings = getattr(transformers, "GgufConfig", None)
    return {"gguf_file": gguf.file, **({"quantization_config": settings(dequantize=True)} if settings else {})}


def forget_gguf(module):
    """Leave no trace of the quantization in a transformers model, so that it can be saved as any other."""
    for part, trace in ((module.config, "quantization_config"), (module, "hf_quantizer")):
        if hasattr(part, trace):
            delattr(part, trace)


def complete_tokenizer(tokenizer, gguf):
    """Give the tokenizer what it lacks of the file: template, special tokens; and set digits apart if the file does.

    It lacks them where a tokenizer.json lies beside the file: transformers then reads that.
    """
    tokenizer.chat_template = tokenizer.chat_template or gguf.settings.get("tokenizer.chat_template")
    for token, key in {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}.items():
        number = gguf.settings.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and getattr(tokenizer, token) is None:
            setattr(tokenizer, token, tokenizer.convert_ids_to_tokens(number))
    if gguf.settings.get("tokenizer.ggml.pre") in DIGITS_APART:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])


def merged(name, module, adapter):
    """The transformers model with an adapter, a folder or hub id, merged into its weights (PEFT).

    Raises ValueError for an adapter that does not fit the model, or that is no change of weights.
    """
    ids, tied = torch.arange(8, device=module.device)[None], module.config.get_text_config().tie_word_embeddings
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, on embedding and head that share their weights
        adapted = with_adapter(name, module, adapter)
        before = adapted(input_ids=ids).logits.float()
        untie(module)
        try:
            module = adapted.merge_and_unload()
        except (AttributeError, NotImplementedError, ValueError) as error:
            raise ValueError(f"The adapter {adapter} cannot be merged into the weights of {name!r} "
                             f"({type(adapted.active_peft_config).__name__}): merge it where it was made.") from error
        after = module(input_ids=ids).logits.float()
    if tied:
        tie_if_equal(module)
    tolerance = max(1e-4, 20 * torch.finfo(module.dtype).eps)
    if (after - before).abs().max() > tolerance * before.abs().max():
        raise ValueError(f"The adapter {adapter}, merged into the weights of {name!r}, does not compute what it does "
                         "beside them: merge it where it was made.")
    return module


def with_adapter(name, module, adapter):
    """The PEFT model of a transformers model and an adapter. Raises ValueError for one that does not fit."""
    import peft
    try:
        config = peft.PeftConfig.from_pretrained(adapter)
        weights = peft.load_peft_weights(adapter, device="cpu")
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise OSError(f"The adapter {adapter} of {name!r} is damaged, or of a kind that peft does not know "
                      f"({type(error).__name__}): restore it, or update peft.") from error
    if config.is_prompt_learning:
        raise ValueError(f"The adapter {adapter} is of the kind {config.peft_type.value}, which changes prompts and no "
                         f"weights: load {name!r} without it, or take a LoRA.")
    try:
        adapted = peft.get_peft_model(module, config)
        result = peft.set_peft_model_state_dict(adapted, weights)
    except (ValueError, KeyError, RuntimeError) as error:  # no such parts, no such weights, other shapes
        raise ValueError(f"The adapter {adapter} does not fit {name!r}, whose parts or shapes are others: load it with "
                         "the model that it was made for, load_model(..., base=...).") from error
    lacking = {key for key in adapted.state_dict() if ".default" in key} & set(result.missing_keys)
    n_fit = len(weights) - len(result.unexpected_keys)
    if lacking or n_fit < len(weights):
        raise ValueError(f"{n_fit or 'None'} of the {len(weights)} weights of the adapter {adapter} fit {name!r}, and "
                         f"{len(lacking)} are missing: load it with the model it was made for, by base=.")
    return adapted


def untie(module):
    """Give parts that share their weights, as embedding and head may do, a copy each."""
    shared = set()
    for part in module.modules():
        for key, weight in part._parameters.items():
            if weight is not None and weight in shared:
                part._parameters[key] = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
            shared.add(weight)


def tie_if_equal(module):
    """Embedding and head share their weights again, unless they have become different."""
    embedding, head = module.get_input_embeddings().weight, module.get_output_embeddings().weight
    for config in (module.config, module.config.get_text_config()):
        config.tie_word_embeddings = torch.equal(embedding, head)
    module.tie_weights()


def library(name, wanted, task):
    """Raises ImportError if a library, which a task needs, is not here."""
    try:
        import_module(wanted)
    except ImportError as error:
        raise ImportError(f"{name!r} needs the library {wanted!r}, with which {task}: pip install {wanted}.") from error
