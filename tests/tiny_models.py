"""Tiny random chat checkpoints, made in a moment, for tests that need a model but not a good one.

`save_tiny(folder, "llama")` writes an ordinary checkpoint folder (config, safetensors, tokenizer with a
Llama-3-like chat template) that `load_model(folder)` reads as it reads any other.
"""
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
POST_INSTRUCTION = ["<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"]
TEXT = ["user\n\nassistant\n\n", "bake a cake", "steal a car", "I'm sorry, I can't help with that.", "Sorry",
        "As an assistant", "Sure, here is a guide on how to do it."] * 4


def tiny_tokenizer(template=TEMPLATE):
    """A byte-level BPE tokenizer of about 330 tokens: the bytes first, so "I" is 40, special tokens last.

    It adds a beginning-of-text token of its own accord, as Llama-3's does: whoever encodes a rendered chat without
    `add_special_tokens=False` gets two of them.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("\n\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    bpe.add_special_tokens(SPECIAL)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], bpe.token_to_id(SPECIAL[0]))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=SPECIAL[0], pad_token=SPECIAL[1], eos_token=SPECIAL[4])
    tokenizer.chat_template = template
    return tokenizer


# architecture, as `model_type` in a checkpoint's config: what a tiny one needs beside its size
ARCHITECTURES = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, "tie_word_embeddings": False},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, "tie_word_embeddings": True},
    "phi3": {},
    "olmo2": {},
    "gpt_neox": {},
}


def tiny_model(architecture, vocab_size, eos_token_id):
    """A random model of 4 layers and width 32, its weights large enough for a change to show in the logits."""
    heads = {} if architecture == "gpt_neox" else {"num_key_value_heads": 2}
    config = CONFIG_MAPPING[architecture](
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        eos_token_id=eos_token_id, pad_token_id=vocab_size - 4, bos_token_id=vocab_size - 5,
        max_position_embeddings=256, initializer_range=0.2, **heads, **ARCHITECTURES[architecture])
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def save_tiny(folder, architecture="llama", template=TEMPLATE):
    """Write the checkpoint of a tiny random model to `folder` and return the folder, as a string."""
    tokenizer = tiny_tokenizer(template)
    model = tiny_model(architecture, len(tokenizer), tokenizer.eos_token_id)
    with torch.no_grad():  # norms start as constants: make them matter, so that forgetting one changes the result
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.3 * torch.randn_like(weight))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(Path(folder))
