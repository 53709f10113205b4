"""What a chat template makes of a request: the prompt, a thought that it opens, the tokens that end a turn.

Nothing is known of a template beforehand. What it does is seen in what it renders.
"""
import re
from os.path import commonprefix

# Two requests with no letter in common at either end. The first has quotes, signs and capitals: whatever a template
# changes in a text, it changes here.
REQUEST, OTHER, ANSWER = 'Is "Tom & Ann\'s" <1> or \\2?', "x", "Seven it is"

# Templates that can leave the thinking out are told so by one of these names. Others pay no heed.
SWITCHES = ("enable_thinking", "thinking")

# <think>, </think>, [THINK], <|begin_of_thought|>, <|END_THINKING|>, <seed:think>; and channels: <|channel|>analysis of
# gpt-oss, <|channel>thought and <channel|> of Gemma 4.
THOUGHT = re.compile(r"[<\[][^<>\[\]\s]*(?:think|thought|reason)[^<>\[\]\s]*[>\]]"
                     r"|<\|channel\|?>\s*\w+|<channel\|>", re.IGNORECASE)
# What only a tag has that closes a thought: as a word of its own, for <extended_thinking> opens one.
CLOSES = re.compile(r"/|(?<![a-z])(?:end|final)(?![a-z])|<channel\|>", re.IGNORECASE)


def ends_by(config):
    """The tokens that end a text by a config or a tokenizer: a set of ids. There they are one, several or none."""
    told = getattr(config, "eos_token_id", None)
    return set(told) if isinstance(told, (list, tuple)) else {told} - {None}


class ChatTemplate:
    """A tokenizer's chat template, as it is found to work.

    remark   what one should know of it, to stand behind a sentence: "; thinking is off", say, or nothing

    Raises ValueError for a template that leaves out what one asks.
    """

    def __init__(self, tokenizer, name):
        self.tokenizer = tokenizer
        self.in_parts, whole = self._content(name)
        self.lead, self.space = "", ""  # between the prompt and its answer: part of the one, and of the other
        thinks = any(not CLOSES.search(tag) for tag in self._thoughts()[-1:])
        if not thinks:
            self.lead, self.space = self._between()
        self.remark = self._on_thinking(thinks) + ("" if whole else "; its template changes the text of what one asks")

    def render(self, text):
        """The chat, as one string, in which a user asks this and the answer is due."""
        return self._chat([("user", text)], add_generation_prompt=True) + self.lead

    def continuation(self, text, answer):
        """Token ids of an answer to the text, as they stand behind the prompt's own."""
        prompt = self.render(text)
        ids, joined = self._encode(prompt), self._encode(prompt + self.space * (answer[:1] != " ") + answer)
        # Where the tokenizer would join the prompt's last token with the answer's first, a model cannot: it goes on
        # from the prompt's.
        return joined[len(ids):] if joined[:len(ids)] == ids else self._encode(answer)

    def openings(self, words):
        """The tokens that are these words at the start of an answer; words of several tokens are left out."""
        tokens = []
        for word in words:
            ways = self.continuation(OTHER, word), self._encode(word)
            tokens += [ids[0] for ids in ways if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id][:1]
        return list(dict.fromkeys(tokens))

    def turn_ends(self, *configs):
        """Ids of all tokens that end an answer: by the configs, by the tokenizer, and by what the template writes.

        These often differ: a fine-tune keeps the config's token of the base model, and ends its turns with another.
        configs: whatever has an `eos_token_id`, such as a model's config and its generation config.
        """
        added, (_, _, behind) = self.tokenizer.added_tokens_decoder.keys(), self._answered()
        told = set().union(*map(ends_by, configs))
        # What a config is silent about has its family's default, which may be any word of this vocabulary.
        defaults = set().union(*(ends_by(type(config)()) for config in configs))
        written = added & self._encode(behind.lstrip())[:1]
        return sorted(told - (defaults - added) | ends_by(self.tokenizer) | written)

    def _encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _chat(self, turns, in_parts=None, switch=False, **options):
        """Turns, as pairs (role, text), rendered."""
        in_parts = self.in_parts if in_parts is None else in_parts
        chat = [{"role": role, "content": [{"type": "text", "text": text}] if in_parts else text}
                for role, text in turns]
        return self.tokenizer.apply_chat_template(chat, tokenize=False, **dict.fromkeys(SWITCHES, switch), **options)

    def _content(self, name):
        """(does the template take the text in parts, as those do that know of images; does it leave the text as it is)

        As a plain string, if that does as well.
        """
        found, reason = {}, "it does not show in the prompt"
        for in_parts in (False, True):
            try:
                one, other = (self._chat([("user", text)], in_parts, add_generation_prompt=True)
                              for text in (REQUEST, OTHER))
            except Exception as error:  # a template is a program, which may raise anything
                reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
            else:
                if one != other:
                    found[in_parts] = REQUEST in one
        if not found:
            raise ValueError(f"The chat template of {name!r} leaves out what one asks ({reason}): choose a model whose "
                             "template takes plain text.")
        in_parts = max(found, key=lambda form: (found[form], not form))
        return in_parts, found[in_parts]

    def _answered(self):
        """A chat with its answer, in three pieces: (what stands before the answer, the answer, what stands behind)."""
        try:
            return self._chat([("user", OTHER), ("assistant", ANSWER)]).rpartition(ANSWER)
        except Exception:  # a template that knows of no answers
            return "", "", ""

    def _between(self):
        """What the template puts between the prompt and an answer -> (what belongs to the prompt, spaces).

        As "<|channel|>final<|message|>" of gpt-oss, without which the answer would begin with these tokens. Most
        templates put nothing there; spaces are left to the answer, whose first token holds them.
        """
        prompt, (before, _, _) = self.render(OTHER), self._answered()
        gap = before.removeprefix(prompt) if before.startswith(prompt) else ""
        header = commonprefix([self.render(REQUEST), prompt])
        if gap.strip() and header.endswith(gap):  # it marks answers as if they were the user's
            gap = ""
        lead = gap.rstrip(" ")
        return lead, gap[len(lead):]

    def _thoughts(self):
        """The tags of thoughts that the prompt has behind the request."""
        return THOUGHT.findall(commonprefix([self.render(text)[::-1] for text in (REQUEST, OTHER)])[::-1])

    def _on_thinking(self, thinks):
        if thinks:
            return "; it thinks before it answers: the refusal metric is about the thought's first token"
        ask = [("user", OTHER)]
        off, on = (self._chat(ask, switch=switch, add_generation_prompt=True) for switch in (False, True))
        if off != on or self._thoughts():
            return "; thinking is off"
        if THOUGHT.search(str(self.tokenizer.chat_template)):
            return "; it may think before it answers: read some of its answers"
        return ""
