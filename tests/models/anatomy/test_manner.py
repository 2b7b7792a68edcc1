"""Which rows may share a batch is proved on opening, and what is claimed holds: no number depends on the batch."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import oracle
from conftest import COMMON, shared_network, tiny_network
from families import build
from prunelens.models.anatomy.proofs import tolerating
from prunelens.models.batches import ANY_LENGTH, Batching, equal_batches, plan_batches
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.models.surgery.drop import Drop, dropped
from prunelens.tracing.forced import Trajectory, forced_states
from prunelens.tracing.generate import Greedy, write

LENGTHS = (4, 9, 6, 9, 30)


def prompts_of(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]


def longrope(kind: Any = transformers.Phi3Config, cls: Any = transformers.Phi3ForCausalLM, **more: Any) -> Any:
    """Other factors beyond 24 tokens."""
    half = (more.get("head_dim") or 8) // 2
    parameters = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 24}
    factors = {"short_factor": [1.0] * half, "long_factor": [4.0] * half}
    config = COMMON | {"original_max_position_embeddings": 24, "rope_parameters": parameters | factors} | more
    return visible(cls(kind(**config)))


def dynamic() -> Any:
    """Frequencies that grow with the length of a text beyond 24 tokens."""
    parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config = transformers.LlamaConfig(**COMMON | {"max_position_embeddings": 24, "rope_parameters": parameters})
    return visible(transformers.LlamaForCausalLM(config))


def visible(network: Any) -> Any:
    torch.manual_seed(0)
    for weight in network.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.2)
    return network.eval()


LENGTH_DEPENDENT = {
    "longrope": longrope,
    "longrope llama": lambda: longrope(transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "dynamic": dynamic,
}


def read_alone(fresh: Any, text: list[int]) -> torch.Tensor:
    """The states of a text in a network that has read nothing before."""
    with torch.inference_mode():
        return copy.deepcopy(fresh).model(input_ids=torch.tensor([text]), use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize("kind", LENGTH_DEPENDENT)
def test_texts_whose_length_counts_are_read_as_a_fresh_model_reads_them_alone(kind: str) -> None:
    network = LENGTH_DEPENDENT[kind]()
    fresh = copy.deepcopy(network)
    model = wrap(network)
    assert model.anatomy.batching == Batching(24, 24, together=True)
    texts = prompts_of((5, 60, 40, 20, 60, 30))
    found = forced_states(model, [Trajectory(0, "greedy", tuple(text), (5,), False) for text in texts])[0]
    for text, state in zip(texts, found, strict=True):
        assert torch.allclose(state, read_alone(fresh, text)[-1], rtol=1e-4, atol=1e-4)
    told = any("beyond 24 tokens" in note for note in model.notes)
    assert told == (model.context_length > 24)  # else no text gets there


@pytest.mark.parametrize("kind", LENGTH_DEPENDENT)
def test_texts_whose_length_counts_are_written_as_alone(kind: str) -> None:
    model = wrap(LENGTH_DEPENDENT[kind]())
    prompts = prompts_of((5, 40, 21))
    together = write(model, prompts, [Greedy() for _ in prompts], 6, 32)
    for prompt, found in zip(prompts, together, strict=True):
        alone = write(wrap(LENGTH_DEPENDENT[kind]()), [prompt], [Greedy()], 6, 32)[0]
        assert torch.equal(alone.states, found.states)
        assert alone.token_ids == found.token_ids


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_factors_that_are_always_the_same_keep_batches_whole(kind: str) -> None:
    parameters = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 24}
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    model = wrap(transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON, rope_parameters=parameters | more)))
    assert model.anatomy.batching.is_free
    assert model.notes == []


def test_a_length_that_no_text_reaches_is_no_remark() -> None:
    parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = wrap(transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON, rope_parameters=parameters)))
    assert model.anatomy.batching == Batching(128, 128, together=True)
    assert model.notes == []


class Capacity(nn.Module):
    """A mixture whose only expert serves the first tokens of the whole batch and drops the others."""

    def __init__(self, inner: nn.Module, capacity: int) -> None:
        super().__init__()
        self.inner, self.capacity = inner, capacity

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        flat = hidden_states.flatten(0, 1)
        served = self.inner(flat) * (torch.arange(len(flat)) < self.capacity).unsqueeze(1)
        return served.view(hidden_states.shape)


class BatchMean(nn.Module):
    """An MLP that centres what it read over the rows of the batch."""

    def __init__(self, inner: nn.Module, share: float = 0.5) -> None:
        super().__init__()
        self.inner, self.share = inner, share

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden_states - self.share * hidden_states.mean(0, keepdim=True))


class LengthScaled(nn.Module):
    """An MLP whose output shrinks with the length of what it reads."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden_states) / hidden_states.shape[1] ** 0.5


@pytest.mark.parametrize("change", [lambda mlp: Capacity(mlp, 15), BatchMean], ids=["capacity", "mean"])
def test_what_others_in_the_batch_change_is_run_alone(change: Any) -> None:
    network = tiny_network("llama")
    network.model.layers[1].mlp = change(network.model.layers[1].mlp)
    model = wrap(network)
    assert not model.anatomy.batching.together
    assert any("alone" in note for note in model.notes)
    prompts = prompts_of((4, 6, 4))
    written = write(model, prompts, [Greedy() for _ in prompts], 3, 8)
    trajectories = [Trajectory(0, "greedy", tuple(prompt), (5,), False) for prompt in prompts]
    states = forced_states(model, trajectories)[0]
    for prompt, found, state in zip(prompts, written, states, strict=True):
        assert found.token_ids == oracle.written_alone(network, prompt, 3)[0]
        with torch.inference_mode():
            alone = network.model(input_ids=torch.tensor([prompt]), use_cache=False).last_hidden_state[0, -1]
        assert torch.allclose(state, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("share", "dtype"),
    [(0.5, torch.bfloat16), (0.5, torch.float16), (0.002, torch.float32)],
)
def test_neighbours_that_count_little_or_in_low_precision_are_seen(share: float, dtype: torch.dtype) -> None:
    """They move a state by a third, which a rounded router may do as well, or by 0.1 %."""
    network = visible(tiny_network("llama"))
    network.model.layers[1].mlp = BatchMean(network.model.layers[1].mlp, share)
    assert not wrap(network.to(dtype)).anatomy.batching.together


def test_what_the_length_of_a_pass_changes_is_not_padded_and_takes_no_cache() -> None:
    network = tiny_network("llama")
    network.model.layers[1].mlp = LengthScaled(network.model.layers[1].mlp)
    with pytest.raises(Exception, match="states that it is read with"):
        wrap(network)


def test_rounding_that_the_whole_batch_decides_is_run_alone() -> None:
    """(As the int8 layers of bitsandbytes do with columns of outliers.)"""
    from prunelens.models.anatomy.find import find_anatomy

    with tolerating(3e-2):
        assert not find_anatomy(shared_network("llama")).batching.together


@pytest.mark.parametrize("family", ["recurrent_gemma", "xlstm", "whisper", "mbart"])
def test_where_left_padding_counts_prompts_of_one_length_go_together(family: str) -> None:
    model = wrap(build(family))
    assert model.anatomy.batching == Batching(ANY_LENGTH, 0, together=True)
    assert any("padding on the left" in note for note in model.notes)


def with_weights_of(family: str, size: float, dtype: torch.dtype) -> Any:
    network = build(family)
    for weight in network.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, size)
    return network.to(dtype).eval()


@pytest.mark.parametrize(
    ("family", "size", "dtype"),
    [
        ("recurrent_gemma", 0.02, torch.float32),  # moves a state by 0.02 %
        ("recurrent_gemma", 0.05, torch.bfloat16),  # by 0.5 %, which is as much as rounding
        ("recurrent_gemma", 0.2, torch.float16),
        ("bigbird_pegasus", 0.02, torch.bfloat16),  # positions count from the padding
        ("bigbird_pegasus", 0.2, torch.bfloat16),
        ("whisper", 0.2, torch.bfloat16),
    ],
)
def test_left_padding_that_counts_little_or_in_low_precision_is_seen(
    family: str, size: float, dtype: torch.dtype
) -> None:
    model = wrap(with_weights_of(family, size, dtype))
    assert model.anatomy.batching.written_up_to == 0
    assert model.anatomy.batching.reads_any_lengths


@pytest.mark.parametrize("size", [0.02, 0.2, 0.6])
@pytest.mark.parametrize("family", ["bamba", "granitemoehybrid", "qwen3_moe", "gpt2", "mamba2"])
def test_rounding_in_low_precision_is_not_taken_for_padding(family: str, size: float) -> None:
    assert wrap(with_weights_of(family, size, torch.bfloat16)).anatomy.batching.is_free


def test_prompts_beside_a_longer_one_have_the_numbers_they_have_alone_where_padding_counts_little() -> None:
    """To float32's rounding, which a shared batch would exceed a hundredfold."""
    model = wrap(with_weights_of("recurrent_gemma", 0.02, torch.float32))
    prompts = prompts_of()
    written = write(model, prompts, [Greedy() for _ in prompts], 4, 8)
    for prompt, found in zip(prompts, written, strict=True):
        tokens, logits = oracle.written_alone(model.network, prompt, 4, model.eos_ids)
        assert found.token_ids == tokens
        assert torch.allclose(model.head(found.states), logits, rtol=0, atol=2e-6 * float(logits.abs().max()))


@pytest.mark.parametrize(
    "family",
    ["mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "lfm2", "qwen3_next", "nemotron_h", "gpt2", "opt", "bloom"],
)
def test_where_left_padding_is_masked_any_prompts_go_together(family: str) -> None:
    """Recurrent families that mask what is padded, and absolute positions that count from the first token."""
    model = wrap(build(family))
    assert model.anatomy.batching.is_free
    assert model.anatomy.manner.cached
    check_written(model)


def check_written(model: Model) -> None:
    prompts = prompts_of()
    written = write(model, prompts, [Greedy() for _ in prompts], 4, 8)
    for prompt, found in zip(prompts, written, strict=True):
        assert found.token_ids == oracle.written_alone(model.network, prompt, 4, model.eos_ids)[0]


@pytest.mark.parametrize("family", ["moshi", "qwen3_vl_moe", "blenderbot"])
def test_a_cache_that_is_wrong_is_not_used(family: str) -> None:
    model = wrap(build(family))
    assert not model.anatomy.manner.cached
    assert any("cache" in note for note in model.notes)
    check_written(model)


@pytest.mark.parametrize("family", ["xlstm", "recurrent_gemma", "mamba"])
def test_a_part_that_is_out_hands_on_the_state_that_it_was_given(family: str) -> None:
    model = wrap(build(family))
    first = model.anatomy.blocks[0].sublayers[0].name
    gone = {"attention": Drop(attention=frozenset([0])), "block": Drop(block=frozenset([0]))}
    for drop in gone.values():
        names = [first] if not drop.block else [part.name for part in model.anatomy.blocks[0].sublayers]
        expected = oracle.emptied(model.network, names)
        with dropped(model.anatomy, drop):
            written = write(model, prompts_of((7,)), [Greedy()], 8, 1)[0]
        assert written.token_ids == oracle.written_alone(expected, prompts_of((7,))[0], 8, model.eos_ids)[0]


def test_plans_obey() -> None:
    lengths = [3, 9, 9, 3, 12]
    assert plan_batches(lengths, 1000, Batching()) == [[4, 1, 2, 0, 3]]
    assert plan_batches(lengths, 1000, Batching(read_up_to=9)) == [[4], [1, 2, 0, 3]]
    assert plan_batches(lengths, 1000, Batching(read_up_to=0)) == [[4], [1, 2], [0, 3]]
    assert plan_batches(lengths, 1000, Batching(together=False)) == [[4], [1], [2], [0], [3]]
    texts = [[1] * length for length in lengths]
    assert [len(batch) for batch in equal_batches(texts, 1000, Batching())] == [1, 2, 2]
    assert [len(batch) for batch in equal_batches(texts, 1000, Batching(together=False))] == [1] * 5
    assert Batching(9, 20) & Batching(12, 10, together=False) == Batching(9, 10, together=False)
