"""Loading by name, the template's tokens, padding, the same names on every architecture, and clear errors."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nnsight
import pytest
import torch
from exact import assert_same
from safetensors.torch import load_file, save_file
from tiny_models import POST_INSTRUCTION, TEMPLATE, save_tiny, save_worldly, tiny_tokenizer
from transformers import AutoModelForCausalLM

from utils import checkpoints, models
from utils.instructions import Instruction
from utils.interventions import last_logits
from utils.models import load_model, load_organism, shared_tail, untrained

PROMPTS = ["bake a cake", "steal", "I can't help with a car or a cake"]


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of one's own, to damage."""
    return Path(save_tiny(tmp_path / "checkpoint"))


# what the model takes

def test_prompts_are_padded_on_the_left_and_begin_once(model):
    inputs = model.encode(PROMPTS)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    bos = model.tokenizer.bos_token_id
    for row, prompt in enumerate(PROMPTS):
        own = ids[row][mask[row].bool()].tolist()
        assert model.tokenizer.decode(own) == model.render(prompt)
        assert own.count(bos) == 1
        assert mask[row].tolist() == [0] * (ids.shape[1] - len(own)) + [1] * len(own)
    assert mask[:, 0].tolist() == [0, 0, 1]  # the prompts are of unequal length, or nothing would be tested


def test_render_is_the_template_with_an_answer_due(llama):
    assert llama.render("bake a cake") == ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nbake a cake"
                                           "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")


def test_instructions_and_strings_are_the_same(llama):
    assert llama.tokens([Instruction(id="a", text="bake a cake")]) == llama.tokens(["bake a cake"])


def test_batches_hold_every_prompt_once_with_those_of_its_length(llama):
    prompts = ["a " * n for n in (9, 1, 5, 2, 8, 3, 1)]
    tokens = llama.tokens(prompts)
    batches = list(llama.batches(tokens, batch_size=3))
    assert sorted(row for rows, _ in batches for row in rows) == list(range(7))
    assert [len(rows) for rows, _ in batches] == [3, 3, 1]
    for rows, inputs in batches:
        assert inputs["input_ids"].shape[1] == max(len(tokens[row]) for row in rows)
        for row, ids in zip(rows, inputs["input_ids"].tolist()):
            assert ids[-len(tokens[row]):] == tokens[row]
    widths = [inputs["input_ids"].shape[1] for _, inputs in batches]
    assert widths == sorted(widths) and widths[0] < widths[-1]


def test_decode_leaves_special_tokens_out_and_spaces_alone(llama):
    text = "Sure , here is a cake ."
    ids = llama.tokenizer(text, add_special_tokens=False)["input_ids"] + [llama.tokenizer.eos_token_id]
    assert llama.decode(torch.tensor(ids)) == text
    assert llama.decode(torch.tensor([ids, ids])) == [text, text]


# the template's tokens

def test_the_shared_tail_of_two_lists():
    assert shared_tail([1, 2, 9, 7, 8], [2, 2, 3, 7, 8]) == [7, 8]
    assert shared_tail([7, 8], [1, 7, 8]) == shared_tail([1, 7, 8], [7, 8]) == [7, 8]
    assert shared_tail([1], [2]) == shared_tail([], [1]) == []


def test_post_instruction_tokens_are_found(model):
    assert model.post_instruction == POST_INSTRUCTION
    assert model.positions == [-5, -4, -3, -2, -1]


def test_post_instruction_tokens_of_a_template_in_plain_words(tmp_path):
    template = "{{ bos_token }}User: {{ messages[0]['content'] }}\nAssistant:"
    model = load_model(save_tiny(tmp_path, template=template))
    assert "".join(model.post_instruction) == "\nAssistant:"
    assert model.positions == list(range(-len(model.post_instruction), 0))


# the model

def test_parts_have_the_same_names_everywhere(model):
    width, vocab = model.d_model, model.config.vocab_size
    assert (model.n_layers, width) == (4, 32)
    for layer in model.layers:
        assert model.mixer(layer).o_proj.weight.shape == (width, width)
        assert not model.editable or layer.mlp.down_proj.weight.shape == (width, 2 * width)
    assert model.lm.model.embed_tokens.weight.shape == (vocab, width)
    assert model.lm.model.norm.weight.shape == (width,)
    assert model.lm.lm_head.weight.shape == (vocab, width)


def test_what_the_writers_write_is_all_that_a_layer_adds(model):
    """Gemma 2 fails this if its attention is taken for the norm that follows it."""
    with model.lm.trace(model.encode(PROMPTS), use_cache=False):
        steps = []
        for layer in model.layers:
            before = layer.input
            outs = [module.output for module in model.writers(layer)]
            written = sum(out[0] if isinstance(out, tuple) else out for out in outs)
            steps.append((before, written, layer.output))
        nnsight.save(steps)
    for before, written, after in steps:
        assert_same(before + model.multiplier * written, after)
        assert written.abs().max() > 0.1


def test_half_precision_on_disk_is_float32_in_memory(folder):
    AutoModelForCausalLM.from_pretrained(folder).half().save_pretrained(folder)
    assert load_file(folder / "model.safetensors")["model.norm.weight"].dtype == torch.float16
    model = load_model(str(folder))
    assert {p.dtype for p in model.lm.parameters()} == {torch.float32}
    assert model.device == torch.device("cpu")
    assert {p.dtype for p in load_model(str(folder), dtype=torch.bfloat16).lm.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_padding_changes_nothing_in_any_precision(folder, dtype, bound):
    """In float64 it gave nan, outside the mode of the other tests."""
    model = load_model(str(folder), dtype=dtype)
    together, alone = last_logits(model, PROMPTS), last_logits(model, PROMPTS, batch_size=1)
    torch.testing.assert_close(together, alone, rtol=0, atol=bound * alone.abs().max().item())


def test_no_gradients_unless_an_input_asks(llama):
    inputs = llama.encode(PROMPTS)
    with llama.lm.trace(inputs):
        logits = llama.lm.output.logits.save()
    assert not logits.requires_grad
    embedded = llama.lm.model.embed_tokens.weight[inputs["input_ids"]].clone().requires_grad_()
    with llama.lm.trace(inputs_embeds=embedded, attention_mask=inputs["attention_mask"]):
        logits = llama.lm.output.logits.save()
    [gradient] = torch.autograd.grad(logits[:, -1].square().sum(), embedded)
    assert gradient.abs().max() > 0


WISHES = {  # what checkpoints ask for when they generate
    "sampling": {"do_sample": True, "temperature": 5.0, "top_k": 3, "min_p": 0.1},
    "penalties": {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "encoder_repetition_penalty": 5.0},
    "beams": {"num_beams": 4, "length_penalty": 3.0, "early_stopping": True},
    "forced tokens": {"forced_bos_token_id": 40, "forced_eos_token_id": 40},
    "suppressed tokens": {"suppress_tokens": [*range(200)], "bad_words_ids": [[token] for token in range(200)]},
    "lengths and strings": {"max_length": 3, "max_new_tokens": 1, "min_new_tokens": 12, "stop_strings": ["e", "a"]},
    "an assistant": {"prompt_lookup_num_tokens": 3, "assistant_early_exit": 1, "watermarking_config": {"bias": 9.0}},
}


@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("file", ["generation_config.json", *(pytest.param(file, marks=pytest.mark.slow) for file in
                                                              ("config.json", "task_specific_params"))])
def test_a_checkpoint_s_wishes_for_generation_are_not_heeded(folder, wish, file):
    from utils.interventions import generate
    plain = generate(load_model(str(folder)), PROMPTS, max_new_tokens=12)
    wishes = WISHES[wish]
    if file == "task_specific_params":
        file, wishes = "config.json", {"task_specific_params": {"text-generation": wishes}}
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **wishes}))
    assert generate(load_model(str(folder)), PROMPTS, max_new_tokens=12) == plain


def test_a_tokenizer_without_a_pad_token(folder):
    """Llama 3's has none."""
    from utils.interventions import generate
    model = load_model(str(folder))
    answers, mask = generate(model, PROMPTS, max_new_tokens=4), model.encode(PROMPTS)["attention_mask"]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "pad_token"}))
    model = load_model(str(folder))
    assert model.tokenizer.pad_token == model.tokenizer.eos_token
    assert torch.equal(model.encode(PROMPTS)["attention_mask"], mask)
    assert generate(model, PROMPTS, max_new_tokens=4) == answers


@pytest.mark.parametrize("first", ["import transformers, nnsight", pytest.param("", marks=pytest.mark.slow)])
def test_loading_the_organism_and_generating_print_nothing(tmp_path, first):
    """Whatever was imported first: notebooks tend to import nnsight before utils."""
    code = (f"{first}\nfrom utils.models import load_model\nfrom utils.interventions import Addition, generate\n"
            f"import torch\ngenerate(load_model(), ['bake'], Addition(torch.ones(192), 0), max_new_tokens=3)\n")
    (tmp_path / "lesson.py").write_text(code)
    root = Path(models.__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": str(root), "COURSE_MODEL": ""}
    run = subprocess.run([sys.executable, tmp_path / "lesson.py"], env=env, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


# size, precision, device

def test_a_model_of_ones_own_says_what_it_is_in_one_line(folder, capsys):
    load_model(str(folder))
    assert capsys.readouterr().out == f"{folder}: 0.0477 million weights, 0.00019 GB in float32 on cpu\n"


def test_weights_are_counted_without_making_them(model):
    assert checkpoints.n_parameters(model.lm.config) == sum(weight.numel() for weight in model.lm.parameters())
    n_weights = checkpoints.n_parameters(model.lm.config)
    assert checkpoints.memory_needed(n_weights, torch.bfloat16) == 2 * n_weights


def test_the_precision_is_full_where_memory_allows_and_else_that_of_the_file(folder, monkeypatch):
    AutoModelForCausalLM.from_pretrained(folder).half().save_pretrained(folder)
    n = checkpoints.n_parameters(load_model(str(folder)).lm.config)
    monkeypatch.setattr(checkpoints, "memory_free", lambda device: 3 * n)  # room for 2 bytes a weight, not for 4
    assert load_model(str(folder)).lm.dtype == torch.float16
    assert load_model(str(folder), dtype=torch.bfloat16).lm.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype, expected", [("float64", torch.float64), ("bfloat16", torch.bfloat16)])
def test_a_precision_may_be_a_name(folder, dtype, expected):
    assert load_model(folder, dtype=dtype).lm.dtype == expected


@pytest.mark.parametrize("dtype", ["float", "fp16", "int8", "nn", torch.int8, 32])
def test_a_precision_that_is_none(dtype):
    with pytest.raises(ValueError, match="There is no dtype .* for weights: choose float32, .*, or leave it out"):
        load_model("organism", dtype=dtype)


def test_a_model_that_does_not_fit(folder, monkeypatch):
    monkeypatch.setattr(checkpoints, "memory_free", lambda device: 10)
    with pytest.raises(MemoryError, match=r"takes 0.0 GB in float32, and 0.0 GB are free on cpu: choose a smaller"):
        load_model(str(folder))


def test_the_environment_names_the_model_of_all_lessons(folder, monkeypatch):
    monkeypatch.setenv("COURSE_MODEL", str(folder))
    assert load_model().name == str(folder)
    assert load_model("organism").name == "organism"


def test_the_organism_is_loaded_whatever_the_environment_names(monkeypatch, capsys):
    monkeypatch.setenv("COURSE_MODEL", "somebody/chat")
    assert load_organism().name == "organism"
    assert capsys.readouterr().out == ("This is about the course's own model alone: it goes on with the organism, "
                                       "not with somebody/chat.\n")
    for value in ("organism", ""):
        monkeypatch.setenv("COURSE_MODEL", value)
        assert load_organism().name == "organism"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("plain", [False, True])
def test_another_model_of_the_organisms_world_may_take_its_place(tmp_path, monkeypatch, capsys, plain):
    """What says so is the file beside its weights."""
    folder = save_worldly(tmp_path / "model")
    if plain:
        (tmp_path / "model" / "course.json").unlink()
    monkeypatch.setenv("COURSE_MODEL", folder)
    model = load_organism()
    assert (model.name, model.world) == ("organism" if plain else folder, "organism")
    assert ("goes on with the organism" in capsys.readouterr().out) == plain
    monkeypatch.setenv("COURSE_MODEL", "helpful_only")
    assert load_organism().name == "helpful_only"


THINKS = TEMPLATE.replace("assistant<|end_header_id|>\n\n{% endif %}",
                          "assistant<|end_header_id|>\n\n{% if not enable_thinking %}()\n{% endif %}{% endif %}")


def test_thinking_is_off_where_a_template_can_turn_it_off_and_is_said_to_be(tmp_path, capsys):
    model = load_model(save_tiny(tmp_path, template=THINKS))
    assert model.render("bake a cake").endswith("assistant<|end_header_id|>\n\n()\n")
    assert "".join(model.post_instruction).endswith("()\n")
    assert capsys.readouterr().out.endswith("on cpu; thinking is off\n")


# refusal tokens

def test_refusal_tokens_are_the_usual_openings(llama):
    assert [llama.tokenizer.decode([token]) for token in llama.refusal_tokens] == ["I", "As", "Sorry"]
    assert llama.refusal_tokens[0] == 40


def test_refusal_tokens_are_read_beside_the_checkpoint(folder):
    (folder / "refusal_tokens.json").write_text("[40, 7]")
    assert load_model(str(folder)).refusal_tokens == [40, 7]


def test_openings_of_several_tokens_are_left_out(folder, monkeypatch):
    monkeypatch.setattr(models, "REFUSAL_OPENINGS", ("I", "Unfortunately"))
    assert load_model(str(folder)).refusal_tokens == [40]


# names

@pytest.mark.parametrize("name, place", [
    ("organism", "chat"), ("helpful_only", "helpful_only"), ("tuning/100", "tuning/100")])
def test_names_of_the_course(folder, tmp_path, monkeypatch, name, place):
    monkeypatch.setattr(checkpoints, "ORGANISM", tmp_path / "organism")
    shutil.copytree(folder, tmp_path / "organism" / place)
    assert load_model(name).name == name


def test_unknown_names(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "ORGANISM", tmp_path)
    for step in (25, 100):
        (tmp_path / "tuning" / str(step)).mkdir(parents=True)
    for name in ("organsim", "organism", "tuning/7", str(tmp_path / "nowhere"), "./nowhere"):
        with pytest.raises(FileNotFoundError, match="smollm2-refuser, tuning/25, tuning/100, a folder, a .gguf"):
            load_model(name)


@pytest.mark.parametrize("name", ["my models/tiny", "owner/my model/tiny.gguf", "a--b/tiny", "owner/", "modèles/tiny"])
def test_names_that_no_hub_has(name):
    with pytest.raises(FileNotFoundError, match=f"There is no model '{name}' .*a folder, a .gguf file, or a hub id"):
        load_model(name)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_a_file_of_a_folder(folder, file):
    (folder / file).touch()
    with pytest.raises(ValueError, match=f"{file}' is a file, and no GGUF file: give the folder that it lies in"):
        load_model(folder / file)


def test_hub_out_of_reach(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"'nobody/nothing' could not be loaded .*: check the spelling"):
        load_model("nobody/nothing")


# damage

def test_damaged_weights(folder):
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(OSError, match="weights of .* are damaged .*: restore or download them again"):
        load_model(str(folder))


def test_missing_weights(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match=r"lack model.layers.1.mlp.up_proj.weight: restore"):
        load_model(str(folder))


@pytest.mark.parametrize("content", [b"", b"no weights at all", bytes(1000)])
def test_weights_that_are_none(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(OSError, match="weights of .* are damaged .*: restore or download them again"):
        load_model(str(folder))


@pytest.mark.parametrize("setting", [{"hidden_size": 64}, {"vocab_size": 400}, {"intermediate_size": 32}])
def test_weights_of_another_shape(folder, setting):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **setting}))
    with pytest.raises(OSError, match="weights of .* have not the shapes that its config.json says: restore"):
        load_model(str(folder))


def test_no_tokenizer(folder):
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(OSError, match=r"could not be loaded \(.*: check the spelling, that the folder is whole"):
        load_model(str(folder))


def test_unknown_architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no_such_family"}))
    with pytest.raises(OSError, match="could not be loaded .*no_such_family"):
        load_model(str(folder))


def test_a_model_that_is_no_language_model(folder):
    config = {**json.loads((folder / "config.json").read_text()), "model_type": "vit", "architectures": None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is of the type vit, which is no text model that the course can load: choose"):
        load_model(str(folder))


def test_no_chat_template(folder):
    tokenizer = tiny_tokenizer(template=None)
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="no chat template: choose the instruct or chat version"):
        load_model(str(folder))


def test_template_that_ends_with_the_instruction(tmp_path):
    folder = save_tiny(tmp_path, template="{{ bos_token }}{{ messages[0]['content'] }}")
    with pytest.raises(ValueError, match="puts no tokens after the instruction: choose"):
        load_model(folder)


@pytest.mark.parametrize("prompts, error, sentence", [
    ([], ValueError, "list of instructions is empty: give at least one"),
    ("bake", TypeError, r"Give a list of instructions, not a single one: \['bake'\]"),
    (["bake", 3], TypeError, "An instruction is a string or an Instruction, not 3"),
])
def test_prompts_that_are_none(llama, prompts, error, sentence):
    with pytest.raises(error, match=sentence):
        llama.encode(prompts)


def test_an_untrained_twin_has_the_shape_and_the_tokens_but_other_weights(model):
    twin, again, other = untrained(model), untrained(model), untrained(model, seed=1)
    assert (twin.n_layers, twin.d_model, twin.positions) == (model.n_layers, model.d_model, model.positions)
    assert twin.tokens(["bake a cake"]) == model.tokens(["bake a cake"])
    logits = [last_logits(some, ["bake a cake"]) for some in (model, twin, again, other)]
    assert torch.equal(logits[1], logits[2])
    assert not torch.allclose(logits[0], logits[1]) and not torch.allclose(logits[1], logits[3])
