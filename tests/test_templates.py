"""What a template does is seen in what it renders: content in parts, thoughts, ends of turns, the first tokens."""
import json
from pathlib import Path

import pytest
import torch
from tiny_models import TEMPLATE, save_tiny, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from utils.interventions import generate, last_logits
from utils.models import load_model
from utils.templates import ChatTemplate

END_OF_TEXT, END_OF_TURN = "<|end_of_text|>", "<|eot_id|>"


def turns(*, content="m['content']", due="assistant\n", open_with="{{ m['role'] }}\n", close_with=END_OF_TURN):
    """A template of turns, each part of which may be another."""
    return ("{% for m in messages %}" + open_with + "{{ " + content + " }}" + close_with + "{% endfor %}"
            "{% if add_generation_prompt %}" + due + "{% endif %}")


def template(text, **settings):
    tokenizer = tiny_tokenizer(text)
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    return ChatTemplate(tokenizer, "tiny")


# where the instruction stands

PARTS = ("{% for m in messages %}{{ m['role'] }}\n{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>"
         "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}" + END_OF_TURN + "{% endfor %}"
         "{% if add_generation_prompt %}assistant\n{% endif %}")
NO_STRINGS = "{% if messages[0]['content'] is string %}{{ raise_exception('content is a list') }}{% endif %}" + PARTS


@pytest.mark.parametrize("text", [PARTS, NO_STRINGS, turns(content="m['content'][0]['text']")])
def test_content_in_parts(tmp_path, text):
    model = load_model(save_tiny(tmp_path, template=text))
    assert model.render("bake a cake") == "user\nbake a cake<|eot_id|>assistant\n"
    assert "".join(model.post_instruction) == "<|eot_id|>assistant\n"
    assert model.turn_ends == [model.tokenizer.convert_tokens_to_ids(END_OF_TURN)]


@pytest.mark.parametrize("text, why", [
    (turns(content="'what?'"), "it does not show in the prompt"),
    ("{{ raise_exception('not today') }}", "not today"),
    (turns(content="m['question'].strip()"), "'dict object' has no attribute 'question'"),
    ("{% for m in messages %}", "Unexpected end of template"),
])
def test_a_template_that_leaves_out_the_instruction(tmp_path, text, why):
    with pytest.raises(ValueError, match=f"leaves out what one asks \\({why}.*\\): choose a model whose template"):
        load_model(save_tiny(tmp_path, template=text))


@pytest.mark.parametrize("content, rendered", [
    ("m['content'] | upper", "BAKE <A> CAKE"), ("m['content'] | e", "bake &lt;A&gt; cake"),
    ("m['content'] | tojson", '"bake <A> cake"'), ("m['content'] | lower", "bake <a> cake")])
def test_a_template_that_changes_the_instruction_says_so(tmp_path, capsys, content, rendered):
    model = load_model(save_tiny(tmp_path, template=turns(content=content)))
    assert model.render("bake <A> cake") == f"user\n{rendered}<|eot_id|>assistant\n"
    assert capsys.readouterr().out.endswith("; its template changes the text of what one asks\n")


# thoughts

THINKS = "; it thinks before it answers: the refusal metric is about the thought's first token"
OFF, MAY = "; thinking is off", "; it may think before it answers: read some of its answers"
CLOSED = "<think>\n\n</think>\n\n"
SWITCHED = "{% if not enable_thinking %}" + CLOSED + "{% endif %}"
THOUGHTS = {  # what a template ends in: (its generation prompt, the remark, what the prompt then ends in)
    "none": ("assistant\n", "", "assistant\n"),
    "a switch": ("assistant\n" + SWITCHED, OFF, CLOSED),
    "a switch of another name": ("assistant\n{% if thinking %}<think>\n{% else %}</think>{% endif %}", OFF, "</think>"),
    "a switch that is told by a system prompt": ("{% if not enable_thinking %}/no_think{% endif %}\nassistant\n", OFF,
                                                 "/no_thinkassistant\n"),
    "always open": ("assistant\n<think>\n", THINKS, "<think>\n"),
    "always open, whatever it says of a switch": ("assistant\n{# enable_thinking #}<think>\n", THINKS, "<think>\n"),
    "a switch for its length alone": ("assistant\n<think>\n{% if not enable_thinking %}briefly: {% endif %}", THINKS,
                                      "briefly: "),
    "closed, and open again": ("assistant\n" + CLOSED + "<think>", THINKS, "<think>"),
    "always closed": ("assistant\n" + CLOSED, OFF, CLOSED),
    "a switch that is only mentioned": ("assistant\n{# enable_thinking #}", "", "assistant\n"),
    "a thought that only the template's code knows": ("assistant\n{% set thought = '</think>' %}", MAY, "assistant\n"),
    "thinking": ("assistant<thinking>", THINKS, "<thinking>"),
    "THINK in brackets": ("[THINK]", THINKS, "[THINK]"),
    "THINK in brackets, closed": ("[THINK][/THINK]", OFF, "[/THINK]"),
    "begin and end": ("<|begin_of_thought|>", THINKS, "<|begin_of_thought|>"),
    "begin and end, closed": ("<|START_THINKING|><|END_THINKING|>", OFF, "<|END_THINKING|>"),
    "with a name of its own": ("<seed:think>", THINKS, "<seed:think>"),
    "reasoning": ("<reasoning>\n", THINKS, "<reasoning>\n"),
    "an end within a word": ("<extended_thinking>", THINKS, "<extended_thinking>"),
    "an end at a word's end": ("<|append_thought|>", THINKS, "<|append_thought|>"),
    "a final within a word": ("[THINK:finalize]", THINKS, "[THINK:finalize]"),
    "an end behind": ("<think><think_end>", OFF, "<think_end>"),
    "a channel of Gemma": ("<|turn>model\n<|channel>thought\n", THINKS, "<|channel>thought\n"),
    "a channel of Gemma, closed": ("<|turn>model\n<|channel>thought\n<channel|>", OFF, "<channel|>"),
    "a channel of Gemma, the last": ("<|turn>model\n<|channel>final\n", OFF, "<|channel>final\n"),
    "a channel": ("<|start|>assistant<|channel|>analysis<|message|>", THINKS, "<|channel|>analysis<|message|>"),
    "the last channel": ("<|start|>assistant<|channel|>final<|message|>", OFF, "<|channel|>final<|message|>"),
}


@pytest.mark.parametrize("due, remark, end", THOUGHTS.values(), ids=THOUGHTS)
def test_thoughts_are_seen_in_the_prompt(due, remark, end):
    found = template(turns(due=due))
    assert found.remark == remark
    assert found.render("bake").endswith(end)


def test_a_request_about_thoughts_opens_none():
    assert template(turns(open_with="<|{{ m['role'] }}|>Do not <think>.\n", due="assistant\n")).remark == MAY


def test_the_line_of_a_model_that_thinks(tmp_path, capsys):
    load_model(save_tiny(tmp_path, template=turns(due="assistant\n<think>\n")))
    assert capsys.readouterr().out.endswith(f" on cpu{THINKS}\n")


# what stands between the prompt and an answer

HARMONY = ("{% for m in messages %}<|start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}"
           "<|message|>{{ m['content'] }}<|end|>{% endfor %}"
           "{% if add_generation_prompt %}<|start|>assistant{% endif %}")


@pytest.mark.parametrize("text, due, remark", [
    (HARMONY, "<|start|>assistant<|channel|>final<|message|>", OFF),
    (turns(open_with="<|{{ m['role'] }}|>\n", due=""), "<|assistant|>\n", ""),  # no word of an answer that is due
    (turns(due="assistant"), "assistant\n", ""),  # nor of the line break behind it
    (turns(open_with="[INST] ", due=""), "<|eot_id|>", ""),  # it takes answers for the user's: nothing can be seen
    (turns(open_with="{{ m['role'] }}: ", due="assistant:"), "assistant:", ""),  # a space is the answer's
    (turns(content="messages[0]['content']"), "assistant\n", ""),  # no answer at all
])
def test_the_prompt_ends_where_the_answer_begins(text, due, remark):
    found = template(text)
    assert found.render("bake").endswith(due) and found.remark == remark
    assert found.render("bake").count(due) == 1


# where a turn ends

@pytest.fixture
def folder(tmp_path):
    """A checkpoint that ends turns with <|eot_id|>, by its tokenizer and its template; its config may say another."""
    def save(architecture="llama", eos=None, generation=None, **options):
        folder = Path(save_tiny(tmp_path / "checkpoint", architecture, **options))
        config = json.loads((folder / "config.json").read_text())
        for settings in (config, config.get("text_config", {})):
            settings.pop("eos_token_id", None)
        if eos is not None:
            config.get("text_config", config)["eos_token_id"] = eos
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "generation_config.json").unlink(missing_ok=True)
        if generation is not None:
            GenerationConfig(eos_token_id=generation).save_pretrained(folder)
        return folder
    return save


def ids(*tokens):
    return tiny_tokenizer().convert_tokens_to_ids(list(tokens))


TEXT_ID, TURN_ID, HEADER_ID = ids(END_OF_TEXT, END_OF_TURN, "<|end_header_id|>")


@pytest.mark.parametrize("architecture, eos, generation, expected", [
    ("llama", TEXT_ID, None, [TEXT_ID, TURN_ID]),  # a fine-tune, merged
    ("llama", TURN_ID, None, [TURN_ID]),
    ("llama", [TEXT_ID, HEADER_ID], None, [TEXT_ID, HEADER_ID, TURN_ID]),
    ("llama", TEXT_ID, [HEADER_ID], [TEXT_ID, HEADER_ID, TURN_ID]),
    ("llama", None, None, [TURN_ID]),  # Llama's default is token 2, here "#"
    ("qwen2", None, None, [TURN_ID]),
    ("gemma3", TEXT_ID, None, [TEXT_ID, TURN_ID]),  # in its text_config
])
def test_answers_end_at_all_that_may_end_them(folder, architecture, eos, generation, expected):
    model = load_model(str(folder(architecture, eos, generation)))
    assert sorted(model.turn_ends) == sorted(expected)
    assert model.lm.generation_config.eos_token_id == model.turn_ends


@pytest.mark.parametrize("text, tokenizer_eos, ends", [
    (TEMPLATE, END_OF_TEXT, [END_OF_TEXT, END_OF_TURN]),  # the template alone knows
    (turns(close_with=" <|eot_id|>\n"), END_OF_TEXT, [END_OF_TEXT, END_OF_TURN]),
    (turns(close_with="{{ eos_token }}"), END_OF_TEXT, [END_OF_TEXT]),
    (turns(close_with="\n\nuser"), END_OF_TEXT, [END_OF_TEXT]),  # no special token: "\n\n" may stand in an answer
    (turns(content="m['content'] | upper"), END_OF_TEXT, [END_OF_TEXT]),  # the answer is not found again
    (TEMPLATE, None, [END_OF_TURN]),
])
def test_the_end_that_the_template_writes(text, tokenizer_eos, ends):
    assert template(text, eos_token=tokenizer_eos).turn_ends() == sorted(ids(*ends))


def test_generation_stops_there_and_the_text_holds_no_trace(folder):
    """The token is added, but not called special: fine-tunes have such."""
    checkpoint = folder(eos=TEXT_ID, tie_word_embeddings=False)
    tokenizer = tiny_tokenizer(turns(close_with="Sorry"))
    tokenizer.add_tokens(AddedToken("Sorry", special=False))
    tokenizer.save_pretrained(checkpoint)
    model = load_model(str(checkpoint))
    [end] = ids("Sorry")
    assert end in model.turn_ends and end not in model.tokenizer.all_special_ids
    with torch.no_grad():
        head, logits = model.lm.lm_head._module.weight, last_logits(model, ["bake"])[0]
        head[end] = 100 * torch.linalg.lstsq(head, logits[:, None]).solution[:, 0]  # along what the head reads
    assert last_logits(model, ["bake"]).argmax() == end
    assert generate(model, ["bake"], max_new_tokens=8) == [""]


def test_a_tokenizer_that_names_no_token_for_an_end(folder):
    checkpoint = folder()
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(checkpoint)
    model = load_model(str(checkpoint))
    assert model.turn_ends == [TURN_ID] and model.tokenizer.pad_token == END_OF_TURN
    tokenizer.chat_template = turns(close_with="\n")
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="names no token that ends a text or pads it: set its eos_token"):
        load_model(str(checkpoint))


# the first token of a word, where it stands

WORDS = ["<unk>", "<s>", "</s>", "▁", "▁I", "I", "▁As", "▁Sor", "ry", "▁[", "/", "[", "INST", "]", "?", "x", "\n", ":"]


def metaspace(text, words=WORDS):
    """A tokenizer whose words carry their space, as Llama 2's and Mistral's, where "I" and "▁I" are two tokens."""
    bpe = Tokenizer(models.Unigram([(word, -float(len(words) - len(word))) for word in words], unk_id=0))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   chat_template=text)


LLAMA_2 = ("{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
           "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}")
LINES = "{{ messages[0]['content'] }}\n"


@pytest.mark.parametrize("text, words, expected", [
    (LLAMA_2, WORDS, ["▁I", "▁As"]),  # the template has a space before an answer; "▁Sor", "ry" are two
    (LLAMA_2.replace("' ' + m", "m"), WORDS, ["I", "▁As"]),  # it has none; no other token says "As"
    (LINES, WORDS, ["I", "▁As"]),
    (LINES, [word for word in WORDS if word != "I"], ["▁I", "▁As"]),
    (LINES, [word for word in WORDS if word not in ("I", "▁I")], ["▁As"]),  # <unk> is no opening
    (LINES.replace("\n", ":"), [*WORDS, ":I"], ["▁I", "▁As"]),  # the prompt's ":" stays: no model says ":I" behind it
])
def test_openings_where_they_stand(text, words, expected):
    tokenizer = metaspace(text, words)
    tokens = ChatTemplate(tokenizer, "tiny").openings(["I", "As", "Sorry", "I"])
    assert tokenizer.convert_ids_to_tokens(tokens) == expected


@pytest.mark.parametrize("text, answer, expected", [
    (LINES, "I?", ["I", "?"]), (LLAMA_2, "I?", ["▁I", "?"]), (LLAMA_2, " I?", ["▁I", "?"])])
def test_an_answer_behind_its_prompt(text, answer, expected):
    tokenizer = metaspace(text)
    assert tokenizer.convert_ids_to_tokens(ChatTemplate(tokenizer, "tiny").continuation("x", answer)) == expected


def test_a_model_has_the_openings_of_its_template(tmp_path):
    save_tiny(tmp_path)
    metaspace(LLAMA_2).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert model.tokenizer.convert_ids_to_tokens(model.refusal_tokens) == ["▁I", "▁As"]
    assert model.tokenizer.convert_ids_to_tokens(model.tokens(["x"])[0])[-len(model.positions):] == \
        ["▁[", "/", "INST", "]"]


@pytest.mark.parametrize("content", [
    '[40, "I"]', "[]", "40", '{"I": 40}', "[-1]", "[100000]", "[40.0]", "[true]", "[40", ""])
def test_refusal_tokens_that_are_none(tmp_path, content):
    save_tiny(tmp_path)
    (tmp_path / "refusal_tokens.json").write_text(content)
    with pytest.raises(ValueError, match="refusal_tokens.json is no list of token ids, from 0 to 328: restore it, or"):
        load_model(str(tmp_path))


def test_refusal_tokens_that_are_named_twice_count_once(tmp_path):
    save_tiny(tmp_path)
    (tmp_path / "refusal_tokens.json").write_text("[40, 7, 40]")
    assert load_model(str(tmp_path)).refusal_tokens == [40, 7]
