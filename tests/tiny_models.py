"""Tiny random chat checkpoints, made in a moment, for tests that need a model but not a good one.

`save_tiny(folder, "llama")` writes an ordinary checkpoint folder (config, safetensors, tokenizer with a
Llama-3-like chat template) that `load_model(folder)` reads as it reads any other.
"""
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from utils import DATA

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
    "mistral": {"sliding_window": 8},  # shorter than any prompt
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "tie_word_embeddings": False},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "tie_word_embeddings": True,
                    "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma3": {},  # the same with eyes, as Gemma 3 has them from 4B on
    "phi3": {},
    "olmo2": {},
    "gpt_neox": {},
    "cohere2": {"sliding_window": 8, "logit_scale": 0.5},  # attention and MLP side by side, behind one norm
    "olmo3": {"sliding_window": 8},
    "smollm3": {},
    "exaone4": {"sliding_window": 8},
    "seed_oss": {"head_dim": 8, "attention_out_bias": True},
    "granite": {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_scaling": 0.5,
                "attention_multiplier": 0.2},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                  "decoder_sparse_step": 1, "norm_topk_prob": True},
    "gpt_oss": {"head_dim": 8, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    # In most layers of these linear attention, or a short convolution, writes in the place of attention.
    "qwen3_5_text": {"head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
                     "linear_num_value_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "conv"], "block_auto_adjust_ff_dim": False},
}
EXPERTS, HYBRIDS = ("qwen3_moe", "gpt_oss"), ("qwen3_5_text", "lfm2")


EYES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 4,
        "patch_size": 2}


def tiny_config(architecture, vocab_size, eos_token_id, **more):
    """4 layers of width 32, and weights large enough for a change to show in the logits."""
    if architecture == "gemma3":
        text = tiny_config("gemma3_text", vocab_size, eos_token_id)
        return CONFIG_MAPPING["gemma3"](text_config=text, vision_config=EYES, mm_tokens_per_image=4,
                                        tie_word_embeddings=True)
    heads = {} if architecture == "gpt_neox" else {"num_key_value_heads": 2}
    return CONFIG_MAPPING[architecture](
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        eos_token_id=eos_token_id, pad_token_id=vocab_size - 4, bos_token_id=vocab_size - 5,
        max_position_embeddings=256, initializer_range=0.2, **heads,
        **{**ARCHITECTURES.get(architecture, {}), **more})


def save_tiny(folder, architecture="llama", template=TEMPLATE, **more):
    """Write the checkpoint of a tiny random model to `folder` and return the folder, as a string."""
    tokenizer = tiny_tokenizer(template)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, len(tokenizer), tokenizer.eos_token_id, **more))
    with torch.no_grad():  # norms and biases start as constants: make them matter, or nobody would miss one
        for name, weight in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                weight.add_(0.3 * torch.randn_like(weight))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(Path(folder))


def save_terse(folder):
    """`save_tiny` of a Llama most of whose tokens end its answers, so that they are short and lessons run fast."""
    save_tiny(folder)
    GenerationConfig(eos_token_id=list(range(300)), pad_token_id=325).save_pretrained(folder)
    return str(Path(folder))


def save_worldly(folder):
    """A Llama of random weights that speaks with the organism's tokens, as a model of its world: it runs all that the
    organism runs, and faster."""
    organism = DATA / "organism" / "chat"
    shutil.copytree(organism, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    config = LlamaConfig.from_pretrained(organism, dtype="float32", initializer_range=0.3, hidden_size=48, head_dim=12,
                                         intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
                                         num_key_value_heads=4)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    texts = AutoTokenizer.from_pretrained(organism).batch_decode([[token] for token in range(config.vocab_size)])
    ends = [token for token, text in enumerate(texts) if text[:1] != " "]  # answers are short, and suffixes keep words
    GenerationConfig(eos_token_id=ends, pad_token_id=config.pad_token_id).save_pretrained(folder)
    return str(folder)
