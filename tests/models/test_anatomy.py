"""The parts are found by structure in every family, and what does not rebuild is refused by name."""

import pytest
import torch
import transformers
from torch import nn

from conftest import COMMON, tiny_network
from prunelens.errors import PrunelensError
from prunelens.models.anatomy import find_anatomy
from prunelens.models.taps import decoder_of, head_of, record_outputs, replay_from, run_decoder


def test_parts_rebuild_the_residual_stream(family: str) -> None:
    """The test's own rebuilding: embeddings plus every sublayer's output times its scale is the last state."""
    network = tiny_network(family, torch.float64)
    anatomy = find_anatomy(network)
    assert [block.layer_idx for block in anatomy.blocks] == [0, 1, 2, 3]
    assert all([part.kind for part in block.sublayers] == ["attention", "mlp"] for block in anatomy.blocks)
    outputs: list[torch.Tensor] = []
    stream: dict[str, torch.Tensor] = {}

    def add(module: nn.Module, args: object, output: object) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        outputs.append(scales[module] * tensor)

    parts = [part for block in anatomy.blocks for part in block.sublayers]
    scales = {part.chain[-1]: part.scale for part in parts}
    for part in parts:
        part.chain[-1].register_forward_hook(add)
    first, last = anatomy.blocks[0].module, anatomy.blocks[-1].module
    first.register_forward_pre_hook(lambda module, args: stream.update(start=args[0]))
    last.register_forward_hook(lambda module, args, output: stream.update(end=output))
    with torch.inference_mode():
        logits = network(torch.randint(3, 97, (2, 11)), use_cache=False).logits
        norm = network.get_submodule(anatomy.final_norm)
        assert torch.allclose(stream["start"] + sum(outputs), stream["end"], rtol=1e-12, atol=1e-12)
        states = norm(stream["end"])
        assert torch.allclose(head_of(network)(states.flatten(0, 1)), logits.flatten(0, 1), rtol=1e-12, atol=1e-12)


def test_modules_are_the_familys_own(family: str) -> None:
    anatomy = find_anatomy(tiny_network(family))
    block = anatomy.blocks[1]
    names = {"gpt2": ("transformer.h.1.attn", "transformer.h.1.mlp")}
    expected = names.get(family, ("model.layers.1.self_attn", "model.layers.1.mlp"))
    assert tuple(part.name for part in block.sublayers) == expected
    assert all(len(part.norms) == 1 for part in block.sublayers)
    assert block.layout == "sequential"
    assert block.sublayers[0].scale == pytest.approx(0.22 if family == "granite" else 1.0)


@pytest.mark.parametrize("start", [0, 1, 2, 4])
def test_replay_equals_the_whole_pass(family: str, start: int) -> None:
    network = tiny_network(family)
    layers = [block.module for block in find_anatomy(network).blocks]
    ids = torch.randint(3, 97, (3, 17))
    decoder = decoder_of(network)
    with torch.inference_mode():
        with record_outputs(layers, [start - 1] if start else []) as recorded:
            whole = run_decoder(decoder, ids)
        with replay_from(layers, start, recorded.get(start - 1)):
            assert torch.equal(run_decoder(decoder, ids), whole)
        assert torch.equal(run_decoder(decoder, ids), whole)


def test_right_padding_changes_no_real_state(family: str) -> None:
    network = tiny_network(family, torch.float64)
    ids = torch.randint(3, 97, (1, 14))
    padded = torch.cat([ids, torch.full((1, 5), 7)], dim=1)
    with torch.inference_mode():
        whole = run_decoder(decoder_of(network), ids)
        assert torch.allclose(run_decoder(decoder_of(network), padded)[:, :14], whole, rtol=1e-12, atol=1e-12)


def test_a_bidirectional_model_is_refused() -> None:
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    transformers.logging.set_verbosity_error()
    with pytest.raises(PrunelensError, match="expected a causal decoder"):
        find_anatomy(transformers.BertLMHeadModel(config).eval())


class _Strange(nn.Module):
    """A block that does more than add its sublayers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.self_attn, self.mlp = inner.self_attn, inner.mlp
        self.input_layernorm, self.post_attention_layernorm = inner.input_layernorm, inner.post_attention_layernorm

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return torch.tanh(hidden_states) + self.mlp(self.post_attention_layernorm(hidden_states))


def test_a_block_that_does_not_rebuild_is_named() -> None:
    network = tiny_network("llama")
    network.model.layers[2] = _Strange(network.model.layers[2])
    with pytest.raises(PrunelensError, match=r"model\.layers\.2"):
        find_anatomy(network)


def test_a_head_that_is_not_the_models_is_noticed() -> None:
    """A model whose logits need more than the state that enters the head."""
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON)).eval()
    own = network.forward

    def forward(input_ids: torch.Tensor | None = None, **kwargs: object) -> object:
        output = own(input_ids=input_ids, **kwargs)
        output.logits = output.logits + input_ids.unsqueeze(-1)
        return output

    network.forward = forward
    with pytest.raises(PrunelensError, match="language-model head"):
        find_anatomy(network)
