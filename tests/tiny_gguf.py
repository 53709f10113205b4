"""Tiny GGUF files: `save_gguf(folder)` writes the checkpoint in a folder as llama.cpp's converter does."""
import json
from pathlib import Path

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FAMILIES = {"gemma3_text": "gemma3", "granite": "granite"}  # as GGUF calls them, where it is not as transformers does
SETTINGS = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim", "rope.dimension_count": "head_dim",
    "attention.sliding_window": "sliding_window", "vocab_size": "vocab_size"}


def save_gguf(folder, path=None, kind="F32", leave_out=(), more=None, tensors=None, omit=None, family=None):
    """Write it to a path, by default model.gguf in a folder of its own -> the path.

    kind: of all matrices, as in gguf.GGMLQuantizationType. leave_out: keys of settings. more: settings besides.
    tensors: tensors besides. omit: the name of one that is left out. family: another name than its own.
    """
    path = Path(path or f"{folder}-gguf/model.gguf")
    path.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config = model.config
    own_family = FAMILIES.get(config.model_type, config.model_type)
    family = family or own_family
    writer = gguf.GGUFWriter(path, family)
    rope = getattr(config, "rope_parameters", None) or {}
    settings = {f"{family}.{key}": getattr(config, name, None) for key, name in SETTINGS.items()}
    settings[f"{family}.rope.freq_base"] = rope.get("full_attention", rope).get("rope_theta")
    if (linear := rope.get("full_attention", rope)).get("rope_type") == "linear":
        settings |= {f"{family}.rope.scaling.type": "linear", f"{family}.rope.scaling.factor": linear["factor"]}
    settings |= {"general.file_type": gguf.LlamaFileType[{"F32": "ALL_F32"}.get(kind, f"MOSTLY_{kind}")].value}
    settings |= vocabulary(tokenizer) | (more or {})
    for key, value in settings.items():
        if value is not None and key.split(".", 1)[1] not in leave_out and key not in leave_out:
            write = {str: writer.add_string, bool: writer.add_bool, list: writer.add_array, float: writer.add_float32}
            write.get(type(value), writer.add_uint32)(key, value)
    quantization = gguf.GGMLQuantizationType[kind]
    for name, weight in {**written(model, own_family), **(tensors or {})}.items():
        if name == omit:
            continue
        kind_of_it = quantization if weight.dim() == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(weight.detach().float().contiguous().numpy(), kind_of_it),
                          raw_dtype=kind_of_it)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def vocabulary(tokenizer):
    """The settings that describe a tokenizer (byte-level BPE)."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {token["content"] for token in described["added_tokens"]}
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
            "tokenizer.ggml.merges": [" ".join(pair) for pair in described["model"]["merges"]],
            "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
            "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
            "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id, "tokenizer.ggml.add_bos_token": True,
            "tokenizer.chat_template": tokenizer.chat_template}


def written(model, family):
    """{GGUF's name: weight}, each as llama.cpp keeps it: Llama's queries and keys permuted, Gemma's norms plus one."""
    [arch] = [arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family]
    names, heads = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers), model.config.num_attention_heads
    weights = {}
    for name, weight in model.named_parameters():  # a weight that two parts share, once
        stem, kind = name.rsplit(".", 1)
        if family == "llama" and stem.endswith(("q_proj", "k_proj")):
            n = heads if stem.endswith("q_proj") else model.config.num_key_value_heads
            weight = weight.unflatten(0, (n, 2, -1)).transpose(1, 2).flatten(0, 2)
        if family.startswith("gemma") and "norm" in stem:
            weight = weight + 1
        weights[f"{names.get_name(stem)}.{kind}"] = weight
    return weights


def dequantized(weight, kind):
    """What a weight is after it was kept in so few bits."""
    kind = gguf.GGMLQuantizationType[kind]
    return torch.tensor(gguf.dequantize(gguf.quantize(weight.detach().numpy(), kind), kind))
