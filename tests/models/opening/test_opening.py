"""Whatever goes wrong while a family is proved is a refusal by name; decoders inside other modules are found."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from conftest import COMMON, GPT2, shared_network, tiny_network
from families import build
from prunelens.errors import PrunelensError
from prunelens.models.anatomy.find import find_anatomy
from prunelens.models.anatomy.hooks import decoder_of
from prunelens.models.opening.loading import wrap


@pytest.mark.parametrize(
    ("family", "decoder"),
    [
        ("llama4", "Llama4TextModel"),
        ("llama4_text", "Llama4TextModel"),
        ("modernbert-decoder", "ModernBertDecoderModel"),
        ("opt", "OPTDecoder"),
        ("llava", "LlamaModel"),
        ("mistral3", "MistralModel"),
    ],
)
def test_the_decoder_is_what_turns_ids_into_states(family: str, decoder: str) -> None:
    network = build(family)
    assert type(decoder_of(network)).__name__ == decoder
    assert wrap(network).anatomy.hidden_size == 32


def test_the_decoder_of_a_model_with_crossing_layers_is_found() -> None:
    """Its `get_decoder()` is itself; without images its cross-attention layers do not run, so one without them."""
    config = MllamaTextConfig(**COMMON | {"cross_attention_layers": []})
    network = transformers.MllamaForCausalLM(config).eval()
    assert len(find_anatomy(network).blocks) == 4


class Silent(transformers.LlamaForCausalLM):
    """A model whose class does not say which of its modules is the decoder."""

    def get_decoder(self) -> Any:
        raise NotImplementedError("no decoder is known")


class Nameless(transformers.GPT2LMHeadModel):
    """The same, by looking for an attribute that it has not."""

    def get_decoder(self) -> Any:
        return self.language_model


@pytest.mark.parametrize(
    ("network", "decoder"),
    [
        (lambda: Silent(transformers.LlamaConfig(**COMMON)), "model"),
        (lambda: Nameless(transformers.GPT2Config(**GPT2)), "transformer"),
    ],
)
def test_a_decoder_that_the_model_does_not_name_is_found(network: Any, decoder: str) -> None:
    assert find_anatomy(network().eval()).decoder == decoder


@pytest.mark.parametrize(
    ("family", "length"),
    [("llama", 64), ("gpt2", 64), ("mpt", 64), ("llava", 64), ("gemma3", 64), ("whisper", 448), ("bloom", None)],
)
def test_the_context_length_is_that_of_the_part_that_writes(family: str, length: int | None) -> None:
    """As far as the model itself can read: one token more fails where positions are a table."""
    model = wrap(build(family))
    assert model.context_length == length
    if length is not None:
        with torch.inference_mode():
            ids = torch.randint(3, 97, (1, length))
            assert model.network(input_ids=ids).logits.shape[1] == length
            if family in ("gpt2", "mpt", "whisper"):
                with pytest.raises((IndexError, RuntimeError)):
                    model.network(input_ids=torch.cat([ids, ids[:, :1]], dim=1))


HEADLESS = {
    "llama": lambda: transformers.LlamaModel(transformers.LlamaConfig(**COMMON)),
    "gpt2": lambda: transformers.GPT2Model(transformers.GPT2Config(**GPT2)),
    "mamba": lambda: transformers.MambaModel(tiny_network("mamba").config),
    "opt": lambda: transformers.OPTModel(tiny_network("opt").config),
    "classifier": lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**COMMON)),
    "tagger": lambda: transformers.LlamaForTokenClassification(transformers.LlamaConfig(**COMMON)),
}


@pytest.mark.parametrize("kind", HEADLESS)
def test_a_model_that_does_not_write_is_refused(kind: str) -> None:
    network = HEADLESS[kind]().eval()
    with pytest.raises(PrunelensError, match=r"\(family .*\): expected a model that writes text"):
        find_anatomy(network)
    with pytest.raises(PrunelensError, match=f"found {type(network).__name__}, which has no head over the vocabulary"):
        wrap(network)


def test_a_module_that_is_no_model_is_refused() -> None:
    with pytest.raises(PrunelensError, match="expected a transformers model, found a module without a configuration"):
        find_anatomy(nn.Linear(2, 2))


class Raising(nn.Module):
    """A part of a family whose code raises."""

    def __init__(self, fault: BaseException) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise self.fault


@pytest.mark.parametrize(
    "fault",
    [KeyError("sliding_attention"), AttributeError("no logits"), TypeError("given twice"), ValueError(), IndexError(7)],
    ids=repr,
)
def test_any_fault_of_a_family_is_a_refusal(fault: Exception) -> None:
    network = tiny_network("llama")
    network.model.layers[2].mlp = Raising(fault)
    with pytest.raises(
        PrunelensError, match=rf"LlamaForCausalLM \(family llama\).*found {type(fault).__name__}"
    ) as told:
        wrap(network)
    assert "\n" not in str(told.value)
    assert "dtype" not in str(told.value).split("found")[1]


@pytest.mark.parametrize(
    "fault",
    [
        KeyboardInterrupt(),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
    ids=repr,
)
def test_interrupts_and_full_memory_pass(fault: BaseException) -> None:
    network = tiny_network("llama")
    network.model.layers[2].mlp = Raising(fault)
    with pytest.raises(type(fault)) as told:
        find_anatomy(network)
    assert told.value is fault


@pytest.mark.parametrize(
    ("message", "is_of_dtype"),
    [
        ("The size of tensor a (2) must match the size of tensor b (4) at non-singleton dimension 3", False),
        ("selected index k out of range", False),
        ("mat1 and mat2 must have the same dtype, but got Float and BFloat16", True),
        ("expected scalar type Double but found Float", True),
        ("\"addmm_impl_cpu_\" not implemented for 'Half'", True),
    ],
)
def test_another_dtype_is_advised_only_where_it_is_the_cause(message: str, is_of_dtype: bool) -> None:
    network = tiny_network("llama")
    network.model.layers[2].mlp = Raising(RuntimeError(message))
    with pytest.raises(PrunelensError) as told:
        wrap(network)
    assert ("try another dtype" in str(told.value)) == is_of_dtype


def test_a_layer_that_returns_a_list_is_looked_into() -> None:
    """openai-gpt returns lists, and normalises the stream itself."""
    with pytest.raises(PrunelensError, match=r"openai-gpt\): expected transformer\.h\.0 to add its sublayers"):
        wrap(build("openai-gpt"))


class Listing(nn.Module):
    """A layer that returns its states in another wrapping."""

    def __init__(self, inner: nn.Module, wrapped: Any) -> None:
        super().__init__()
        self.inner, self.wrapped = inner, wrapped

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped(self.inner(*args, **kwargs))


@pytest.mark.parametrize("wrapped", [lambda states: {"states": states}, lambda states: [[states]]], ids=["map", "nest"])
def test_a_layer_without_states_is_refused_by_name(wrapped: Any) -> None:
    network = tiny_network("llama")
    network.model.layers[3] = Listing(network.model.layers[3], wrapped)
    network.model.norm = Listing(network.model.norm, lambda states: states)
    with pytest.raises(PrunelensError, match=r"LlamaForCausalLM \(family llama\): expected"):
        wrap(network)


def test_opening_leaves_a_network_as_it_was() -> None:
    network = shared_network("llama")
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    settings = network.generation_config
    find_anatomy(network)
    assert network.generation_config is settings
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
