"""Load a chat model by name, and one thin object around it that looks the same on every architecture."""
import json
import warnings
from itertools import takewhile
from pathlib import Path

import torch
from nnsight import TransformersModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils import DATA
from utils.instructions import as_texts

ORGANISM = DATA / "organism"

# Llama's names for a model's parts, which most families use, given to the one that does not (GPT-NeoX).
RENAME = {
    "gpt_neox": "model", "embed_in": "embed_tokens", "final_layer_norm": "norm", "embed_out": "lm_head",
    "attention": "self_attn", "attention.dense": "attention.o_proj", "mlp.dense_4h_to_h": "mlp.down_proj",
}

# First words of the usual refusals: "I cannot ...", "As an AI ...", "Sorry, ...".
REFUSAL_OPENINGS = ("I", "As", "Sorry")

# nnsight warns whenever `for _ in tracer.all()` ends, which is always at the model's last step.
warnings.filterwarnings("ignore", message=".*was never reached: the loop asked for a step")


def load_model(name="organism", dtype=None, device=None):
    """Load a chat model.

    name: "organism" (the course's own), "helpful_only" (before its safety tuning), "tuning/STEP" (during it), the path
    of a folder, or a hub id such as "Qwen/Qwen2.5-1.5B-Instruct".
    dtype, device: float32 on the CPU unless you say otherwise.

    Raises FileNotFoundError for a name or folder that is not there, OSError for files that cannot be read or fetched,
    ValueError for a model that is not a chat model.
    """
    source = _locate(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
        module, info = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or torch.float32,
                                                            output_loading_info=True)
    except SafetensorError as error:
        raise OSError(f"The weights of {name!r} are damaged ({error}): restore or download the file again.") from error
    except (OSError, ValueError) as error:
        raise OSError(f"{name!r} could not be loaded ({_first_line(error)}): check its spelling, that its folder is "
                      "whole or the hub within reach, and, if its licence must be accepted first, that you are logged "
                      "in (`hf auth login`).") from error
    if info["missing_keys"]:
        raise OSError(f"The weights of {name!r} lack {sorted(info['missing_keys'])[0]!r} and perhaps others: "
                      "restore or download the files again.")
    if not tokenizer.chat_template:
        raise ValueError(f"{name!r} has no chat template, so it is no chat model: choose its instruct or chat version.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    # With its parameters frozen the model builds no graph for gradients, unless an input asks for one.
    module.to(device or "cpu").requires_grad_(False)
    lm = TransformersModel(module, tokenizer=tokenizer, task="text-generation", rename=RENAME)
    return ChatModel(lm, tokenizer, name, _refusal_tokens(source, tokenizer))


class ChatModel:
    """A chat model for nnsight, and what one needs to know of its tokens.

    lm                the nnsight model: `with model.lm.trace(inputs) as tracer: ...`; its parts have the same names on
                      every architecture: `lm.model.embed_tokens`, `lm.model.layers[i].self_attn` (with `o_proj`) and
                      `.mlp` (with `down_proj`), `lm.model.norm`, `lm.lm_head`
    layers            the layers, in order; `n_layers`, `d_model`
    post_instruction  the tokens of the chat template that follow the instruction, as strings (paper, section 2.1)
    positions         where they are, counted from the end: [-n, ..., -1]
    refusal_tokens    ids of the tokens that refusals begin with (paper, appendix B); set it if you know better
    """

    def __init__(self, lm, tokenizer, name, refusal_tokens):
        self.lm, self.tokenizer, self.name, self.refusal_tokens = lm, tokenizer, name, refusal_tokens
        self.layers = list(lm.model.layers)
        self.n_layers, self.d_model = len(self.layers), lm.config.hidden_size
        self.post_instruction = self._find_post_instruction()
        self.positions = list(range(-len(self.post_instruction), 0))

    def __repr__(self):
        return f"ChatModel({self.name!r}, {self.n_layers} layers, d_model {self.d_model}, on {self.device})"

    @property
    def device(self):
        return self.lm.device

    def render(self, instruction):
        """The chat, as one string, that asks the instruction and leaves the answer to the model."""
        [text] = as_texts([instruction])
        chat = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    def tokens(self, instructions):
        """The token ids of each rendered instruction: a list of lists, each of its own length."""
        chats = [self.render(text) for text in as_texts(instructions)]
        return self.tokenizer(chats, add_special_tokens=False)["input_ids"]  # the template has put them in already

    def pad(self, tokens):
        """Lists of token ids -> {"input_ids", "attention_mask"}, each [n_prompts, n_tokens], padded on the left.

        So the last token of every prompt stands at position -1.
        """
        return dict(self.tokenizer.pad({"input_ids": tokens}, return_tensors="pt").to(self.device))

    def encode(self, instructions):
        """Instructions -> what the model takes: `pad(tokens(instructions))`."""
        return self.pad(self.tokens(instructions))

    def batches(self, tokens, batch_size):
        """Yield (rows, padded batch), shortest prompts first so that little is padded; `rows` says which they are."""
        order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))
        for start in range(0, len(order), batch_size):
            rows = order[start:start + batch_size]
            yield rows, self.pad([tokens[row] for row in rows])

    def decode(self, ids):
        """Token ids [n_tokens] -> text, or [n_rows, n_tokens] -> list of texts, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def writers(self, layer):
        """The two modules of a layer that write to the residual stream, in the order in which they run.

        The attention and the MLP; where a family normalises their outputs once more (Gemma 2 and 3, OLMo 2), those norms.
        """
        if hasattr(layer._module, "post_feedforward_layernorm"):
            return layer.post_attention_layernorm, layer.post_feedforward_layernorm
        return layer.self_attn, layer.mlp

    def _find_post_instruction(self):
        """The tokens at the end that two prompts share: what follows the instruction, by whatever template."""
        one, two = self.tokens(["x", "?"])
        same = [a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(reversed(one), reversed(two)))]
        if not 0 < len(same) < len(one):
            raise ValueError(f"The chat template of {self.name!r} puts no tokens of its own after the instruction: "
                             "choose a model whose template does.")
        return [self.tokenizer.decode([token]) for token in reversed(same)]


def _locate(name):
    """The folder, or else the hub id, that a name stands for."""
    if name == "organism":
        folder = ORGANISM / "chat"
    elif name == "helpful_only" or name.startswith("tuning/"):
        folder = ORGANISM / name
    elif Path(name).expanduser().is_dir() or name.startswith((".", "/", "~")):
        folder = Path(name).expanduser()
    elif name.count("/") == 1:
        return name
    else:
        raise FileNotFoundError(
            f"There is no model called {name!r}: choose \"organism\", \"helpful_only\", \"tuning/STEP\", the path of a "
            "folder, or a hub id such as \"Qwen/Qwen2.5-1.5B-Instruct\".")
    if not (folder / "config.json").is_file():
        steps = [f"tuning/{path.name}" for path in (ORGANISM / "tuning").glob("*")]
        hint = f"choose one of {', '.join(sorted(steps))}" if name.startswith("tuning/") and steps else \
            "check the path, or run `make model` to build the course's own models"
        raise FileNotFoundError(f"There is no model in {folder}: {hint}.")
    return str(folder)


def _refusal_tokens(source, tokenizer):
    """Read from the organism's refusal_tokens.json; for another model, the usual first words that are single tokens."""
    folders = [Path(source)] + [ORGANISM / "chat"] * (ORGANISM in Path(source).parents)
    for file in (folder / "refusal_tokens.json" for folder in folders):
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
    ids = [tokenizer.encode(word, add_special_tokens=False) for word in REFUSAL_OPENINGS]
    return [word[0] for word in ids if len(word) == 1]


def _first_line(error):
    return str(error).strip().splitlines()[0].rstrip(".:") if str(error).strip() else type(error).__name__
