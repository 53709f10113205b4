"""A model that several devices share. There is one here: the second is a pretence, see `TwoDevices`."""
import pytest
import torch
from exact import assert_same
from tiny_models import save_tiny
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoModelForCausalLM

from utils import checkpoints
from utils.activations import residual_stream, trace_heads
from utils.evaluation import answer_losses
from utils.instructions import Instruction
from utils.interventions import Ablation, Addition, added_bias, generate, last_logits, orthogonalized
from utils.models import load_model

PROMPTS = ["bake a cake", "steal", "I can't help with a car or a cake", "Sorry, a car"]
ANSWERED = [Instruction(id=text, text=text, answer="Sure, here is " + text) for text in PROMPTS]
FAR = torch.device("meta")  # the name of the second device; what lies there is in this memory too, and has values


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def is_far(x):
    return getattr(x, "far", False)


class TwoDevices(TorchFunctionMode):
    """Tensors marked `far` are on a second device: what takes a near and a far one fails, as with two GPUs."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return FAR if is_far(args[0]) else func(*args)
        if func in (torch.Tensor.to, torch.Tensor.cpu):
            return move(*args, *(["cpu"] if func is torch.Tensor.cpu else []), **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        far = any(map(is_far, inputs))
        if len({is_far(x) for x in inputs if x.dim()}) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, in {func.__name__}")
        if kwargs.get("device") == FAR:
            far, kwargs["device"] = True, "cpu"
        return tree_map_only(torch.Tensor, lambda x: mark(x, far), func(*args, **kwargs))


def move(x, *to, device=None, dtype=None, **options):
    """`x.to(...)`: a copy that is far or near, as another tensor is or a device says."""
    for place in (*to, device, dtype):
        if isinstance(place, torch.Tensor):
            return mark(x.to(place.dtype).clone(), is_far(place))
        if isinstance(place, torch.dtype):
            x = mark(x.to(place).clone(), is_far(x))
        elif isinstance(place, (torch.device, str)):
            x = mark(x.clone(), place == FAR)
    return x


def mark(x, far):
    x.far = far
    return x


def place(module, far):
    """Mark a module's weights; its inputs follow them, as `accelerate` sees to it."""
    for weight in module.parameters():
        weight.far = far
    there = FAR if far else torch.device("cpu")
    module.register_forward_pre_hook(lambda module, *inputs: send(inputs, there), with_kwargs=True)


def send(inputs, device):
    return tree_map_only(torch.Tensor, lambda x: x.to(device), inputs)


@pytest.fixture(params=["llama", "gemma2", "olmo2"])
def both(request, tmp_path, monkeypatch):
    """The same model twice: on one device, and with the second half of its layers on another."""
    folder = save_tiny(tmp_path, request.param)
    one, two = load_model(folder), load_model(folder)
    module = two.lm._module
    for part in (*module.model.layers[2:], module.model.norm):
        place(part, far=True)
    place(module.lm_head, far=module.lm_head.weight is not module.model.embed_tokens.weight)
    module.register_forward_hook(lambda module, args, out: send(out, torch.device("cpu")))
    parameter = torch.nn.Parameter  # lies where its data lie
    monkeypatch.setattr(torch.nn, "Parameter", lambda data, **options: mark(parameter(data, **options), is_far(data)))
    return one, two


CHANGES = [None, Ablation(randn(32)), Ablation(randn(4, 32)), Addition(randn(32), 3), Addition(randn(4, 32), 3)]


@pytest.mark.parametrize("change", CHANGES)
def test_interventions_follow_the_layers(both, change):
    one, two = both
    with TwoDevices():
        logits, answers = last_logits(two, PROMPTS, change), generate(two, PROMPTS, change, 3)
        losses = answer_losses(two, ANSWERED, change)
    assert_same(logits, last_logits(one, PROMPTS, change))
    assert_same(losses, answer_losses(one, ANSWERED, change))
    assert answers == generate(one, PROMPTS, change, 3)


@pytest.mark.parametrize("change", [Ablation, lambda r: Addition(r, 3)], ids=["ablation", "addition"])
def test_a_direction_on_another_device_comes_to_the_model(both, change):
    one, two = both
    with TwoDevices():
        logits = last_logits(two, PROMPTS, change(mark(randn(32), far=True)))
    assert_same(logits, last_logits(one, PROMPTS, change(randn(32))))


def test_readings_come_together(both):
    one, two = both
    with TwoDevices():
        streams, heads = residual_stream(two, PROMPTS), trace_heads(two, two.encode(PROMPTS))
    assert_same(streams, residual_stream(one, PROMPTS))
    assert_same(heads, trace_heads(one, one.encode(PROMPTS)))


@pytest.mark.parametrize("edit", [orthogonalized, lambda m, r: added_bias(m, r, 3)], ids=["orthogonalized", "bias"])
def test_edits_follow_the_weights(both, edit):
    one, two = both
    with TwoDevices(), edit(two, randn(32)):
        logits = last_logits(two, PROMPTS)
    with edit(one, randn(32)):
        assert_same(logits, last_logits(one, PROMPTS))


def test_the_pretence_tells_near_from_far():
    with TwoDevices():
        near = torch.ones(2)
        far = near.to(FAR)
        assert (far.device, (far + 1).device, (2 * far[:1]).device) == (FAR, FAR, FAR)
        assert near.to(far).device == FAR and far.to(near).device == far.cpu().device == near.device
        for mix in (lambda: near + far, lambda: torch.stack([near, far]), lambda: torch.dot(near, far)):
            with pytest.raises(RuntimeError, match="same device"):
                mix()


# loading

@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path)


@pytest.fixture
def two_gpus(monkeypatch):
    """Two GPUs, each with room for two thirds of the tiny model in float32."""
    monkeypatch.setattr(checkpoints, "best_device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(47_700 * 4 * 2 / 3), None))
    monkeypatch.setattr(checkpoints, "is_accelerate_available", lambda: True)


def test_auto_is_all_gpus_and_their_memory_together(folder, two_gpus, monkeypatch):
    asked = {}

    def from_pretrained(source, device_map, **options):
        asked["device_map"] = device_map
        return load(source, **options)
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(MemoryError, match="takes 0.0 GB .*, and 0.0 GB are free on cuda:0: .*device=.auto"):
        load_model(folder, torch.float32, "cuda:0")
    with pytest.raises(MemoryError, match="Only a part of .* fits on cuda:0, cuda:1: choose"):  # it was put on the CPU
        load_model(folder, torch.float32, "auto")
    assert asked == {"device_map": "auto"}


def test_auto_is_the_one_device_where_there_is_but_one(folder):
    assert torch.cuda.device_count() > 1 or load_model(folder, device="auto").device.type == checkpoints.best_device()


def test_auto_without_accelerate(folder, two_gpus, monkeypatch):
    monkeypatch.setattr(checkpoints, "is_accelerate_available", lambda: False)
    with pytest.raises(ImportError, match="pip install accelerate"):
        load_model(folder, device="auto")


@pytest.mark.parametrize("device", ["gpu", "cuda:2", "mps", "meta", "cpu:1", "cuda:0,cpu"])
def test_devices_that_are_not_here(two_gpus, device):
    with pytest.raises(ValueError, match=f"no device '{device}' here: choose cpu, cuda:0, cuda:1 or auto"):
        checkpoints.devices_of(device)
    for name in ("cuda:1", "cpu"):
        assert checkpoints.devices_of(name) == [torch.device(name)]


def test_a_model_stays_on_the_cpu_if_told_to(folder, monkeypatch):
    """transformers' pipelines move what they get to the first GPU."""
    monkeypatch.setattr("transformers.pipelines.base.is_torch_cuda_available", lambda: True)
    assert load_model(folder, device="cpu").device.type == "cpu"
