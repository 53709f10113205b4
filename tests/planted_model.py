"""A chat model whose refusal direction is known, because it was put there by hand.

A request is harmful if it holds a "#" and harmless if it holds a "+"; all its other characters are chance. The model
has 6 layers, one head each, attention that looks evenly at all earlier tokens, no MLP, and three things to do:

    layer 0  copies some of the words to later tokens: chance, as far as refusal goes
    layer 1  writes the refusal direction r wherever a "#" came before, and nothing else
    layer 2  writes a topic, +q after a "#" and -q after a "+"

It says "I" by what it has along r, and the common first word of an answer by what it has along -q. So the residual
stream at the start of layer 2 differs by r alone; from layer 3 on, by r and q together, and whoever erases that
mixture changes answers to harmless requests too.
"""
import torch
from tiny_models import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH, LAYERS, WORDS = 32, 6, 20  # the first 20 entries of the stream hold what a token is
HARM, CALM, ALWAYS = 20, 21, 22  # entries that mark a "#", a "+", and the last token of the template
REFUSAL, ANSWER = "I", "S"


def planted_directions():
    """r and q, of length 1 and at right angles, in the entries that no token uses."""
    plane = torch.zeros(WIDTH, 2)
    plane[23:] = torch.randn(WIDTH - 23, 2, generator=torch.Generator().manual_seed(7))
    return torch.linalg.qr(plane).Q.T


def save_planted(folder):
    """Write the model to `folder` as an ordinary checkpoint, and return the folder as a string."""
    tokenizer = tiny_tokenizer()
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=LAYERS,
        num_attention_heads=1, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False)).requires_grad_(False)
    r, q = planted_directions()

    def token(text):
        [only] = tokenizer.encode(text, add_special_tokens=False)
        return only

    for weight in model.parameters():
        if weight.dim() == 2:
            weight.zero_()
    embedding = model.model.embed_tokens.weight
    embedding[:, :WORDS] = torch.randn(len(tokenizer), WORDS, generator=torch.Generator().manual_seed(8))
    embedding[token("#"), HARM] = 4
    embedding[token("+"), CALM] = 4
    embedding[token("\n\n"), ALWAYS] = 3

    def write(layer, read, written):
        """Attention of a layer: mean over earlier tokens of what they hold along `read`, times `written`."""
        attention = model.model.layers[layer].self_attn
        attention.v_proj.weight[:len(read)] = read
        attention.o_proj.weight[:, :len(read)] = written.T

    entries = torch.eye(WIDTH)
    write(0, entries[:WORDS], entries[:WORDS])
    write(1, entries[[HARM]], 60 * r[None])
    write(2, (entries[HARM] - entries[CALM])[None], 60 * q[None])

    model.lm_head.weight[token(REFUSAL)] = 20 * r
    model.lm_head.weight[token(ANSWER)] = 4 * entries[ALWAYS] - 6 * q
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def planted_prompts(mark, n, seed=0):
    """n requests of random letters that hold the mark, "#" for harmful or "+" for harmless, somewhere."""
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for _ in range(n):
        letters = [chr(98 + i) for i in torch.randint(0, 24, (8,), generator=generator)]
        letters.insert(int(torch.randint(0, 9, (1,), generator=generator)), mark)
        prompts.append(" ".join(letters))
    return prompts
