"""The parts are found by structure in every family, and what does not rebuild is refused by name."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import oracle
from conftest import ALL_FAMILIES, COMMON, shared_network, tiny_network
from prunelens.errors import PrunelensError
from prunelens.models.anatomy.find import find_anatomy
from prunelens.models.anatomy.hooks import decoder_of, head_of, record_outputs, replay_from, run_decoder
from prunelens.models.anatomy.streams import BlockPass, watched_blocks

# Families whose attention takes its softmax in float32 whatever the model's dtype.
FLOAT32_SOFTMAX = {"gemma2", "bloom", "mpt"}
# Families whose arithmetic has a float32 or narrower part whatever the model's dtype: mixtures of experts computed
# in groups, and state spaces.
ONLY_FLOAT32 = {
    *("mixtral", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "deepseek_v3", "qwen3_next", "lfm2_moe"),
    *("nemotron_h", "jamba", "mamba", "mamba2", "granitemoeshared", "granitemoehybrid", "falcon_h1"),
}
PARALLEL = {"phi", "cohere", "cohere2", "gpt_neox", "gptj", "falcon", "falcon one norm"}
SHARED_NORM = PARALLEL - {"gpt_neox", "falcon"}
TWO_NORMS = {"gemma2", "gemma3", "glm4"}
# What each chain's output is multiplied by: those of an attention, and those of an MLP, in rising order.
ONE = ([1.0], [1.0])
SCALES = {
    **dict.fromkeys(("granite", "granitemoe"), ([0.22], [0.22])),
    **dict.fromkeys(("granitemoeshared", "granitemoehybrid"), ([0.22], [0.22, 0.22])),
    "falcon_h1": ([0.6, 1.3], [1.0]),
}


def precise(family: str) -> tuple[Any, float]:
    """A network, and how far its sums may be off."""
    if family in ONLY_FLOAT32:
        return shared_network(family), 1e-5
    return tiny_network(family, torch.float64), 1e-12


def hook_outputs(modules: list[nn.Module], outputs: dict[nn.Module, torch.Tensor]) -> list[Any]:
    """Collect copies of what modules return: a layer may add to it in place."""

    def keep(module: nn.Module, args: object, output: Any) -> None:
        outputs[module] = (output[0] if isinstance(output, tuple) else output).clone()

    return [module.register_forward_hook(keep) for module in modules]


def test_parts_rebuild_the_residual_stream(any_family: str) -> None:
    """The test's own rebuilding: embeddings plus every sublayer's output times its scale is the last state."""
    network, tolerance = precise(any_family)
    anatomy = find_anatomy(network)
    outputs: dict[nn.Module, torch.Tensor] = {}
    start: list[torch.Tensor] = []
    ends = [strand.chain[-1] for block in anatomy.blocks for part in block.sublayers for strand in part.strands]
    handles = hook_outputs([*ends, *(block.module for block in anatomy.blocks)], outputs)
    handles.append(anatomy.blocks[0].module.register_forward_pre_hook(lambda module, args: start.append(args[0])))
    with torch.inference_mode():
        logits = network(torch.randint(3, 97, (2, 11)), use_cache=False).logits
    for handle in handles:
        handle.remove()
    stream = start[0]
    for block in anatomy.blocks:
        before = stream
        for part in (strand for sublayer in block.sublayers for strand in sublayer.strands):
            output = outputs[part.chain[-1]].reshape(stream.shape)
            stream = output if part.adds_residual else stream + part.scale * output
        assert torch.allclose(stream, outputs[block.module], rtol=tolerance, atol=tolerance)
        assert not torch.allclose(stream, before, rtol=1e-2, atol=1e-2)
    with torch.inference_mode():
        states = network.get_submodule(anatomy.final_norm)(stream)
        head = head_of(network)(states.flatten(0, 1))
    assert torch.allclose(head, logits.flatten(0, 1), rtol=10 * tolerance, atol=10 * tolerance)


def test_streams_around_sublayers(any_family: str) -> None:
    """What is seen of a block adds up to the block, and a sublayer run again on the same input gives the same."""
    network = shared_network(any_family)
    anatomy = find_anatomy(network)
    passes: list[BlockPass] = []
    with torch.inference_mode(), watched_blocks(anatomy.blocks, passes.append):
        run_decoder(decoder_of(network), torch.randint(3, 97, (2, 11)))
    with torch.inference_mode():
        for seen, block in zip(passes, anatomy.blocks, strict=True):
            if block.layout == "parallel":
                total = seen.before + sum(part.after - part.before for part in seen.sublayers)
            else:
                total = seen.sublayers[-1].after
            assert torch.allclose(total, seen.after, rtol=1e-5, atol=1e-5)
            for part in seen.sublayers:
                assert torch.allclose(part.twin_after(part.sublayer), part.after, rtol=1e-5, atol=1e-5)


def test_sublayers_are_the_familys_own(any_family: str) -> None:
    """Kind, layout, norms and scale of every sublayer, and that it holds the output projection named by hand."""
    network = shared_network(any_family)
    anatomy = find_anatomy(network)
    for block, has, projections in zip(
        anatomy.blocks, oracle.outline(network), oracle.projections(network), strict=True
    ):
        kinds = [kind for kind, there in zip(("attention", "mlp"), has, strict=True) if there]
        assert [part.kind for part in block.sublayers] == kinds
        assert block.layout == ("parallel" if any_family in PARALLEL else "sequential")
        for part in block.sublayers:
            weights = {id(weight) for module in part.body for weight in module.parameters()}
            assert {id(weight) for weight in projections[part.kind]} <= weights
            assert len(part.norms) == (0 if any_family in SHARED_NORM else 2 if any_family in TWO_NORMS else 1)
            scales = SCALES.get(any_family, ONE)[part.kind == "mlp"]
            assert sorted(strand.scale for strand in part.strands) == pytest.approx(scales)
            adds_inside = any_family == "bloom" or (any_family == "mpt" and part.kind == "mlp")
            assert part.adds_residual == adds_inside


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ("model.layers.1.self_attn", "model.layers.1.mlp")),
        ("gpt2", ("transformer.h.1.attn", "transformer.h.1.mlp")),
        ("opt", ("model.decoder.layers.1.self_attn", "model.decoder.layers.1.fc1+fc2")),
        ("lfm2_moe", ("model.layers.1.conv", "model.layers.1.feed_forward")),
        ("nemotron_h", ("model.layers.1.mixer",)),
        ("granitemoeshared", ("model.layers.1.self_attn", "model.layers.1.block_sparse_moe+shared_mlp")),
        ("falcon_h1", ("model.layers.1.mamba+self_attn", "model.layers.1.feed_forward")),
        ("mamba", ("backbone.layers.1.mixer",)),
    ],
)
def test_names(family: str, names: tuple[str, ...]) -> None:
    block = find_anatomy(shared_network(family)).blocks[1]
    assert tuple(part.name for part in block.sublayers) == names


def test_replay_equals_the_whole_pass(any_family: str) -> None:
    network = shared_network(any_family)
    layers = [block.module for block in find_anatomy(network).blocks]
    ids = torch.randint(3, 97, (3, 17))
    decoder = decoder_of(network)
    with torch.inference_mode():
        with record_outputs(layers, range(len(layers))) as recorded:
            whole = run_decoder(decoder, ids)
        for start in range(len(layers) + 1):
            with replay_from(layers, start, recorded.get(start - 1)):
                assert torch.equal(run_decoder(decoder, ids), whole)
        assert torch.equal(run_decoder(decoder, ids), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_is_found_in_other_dtypes(any_family: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and any_family in ONLY_FLOAT32 - {"mamba", "mamba2"}:
        pytest.skip("cannot compute in float64")
    found, expected = (
        [(part.name, part.kind, part.norms, part.residual_at) for block in blocks for part in block.sublayers]
        for blocks in (
            find_anatomy(tiny_network(any_family, dtype)).blocks,
            find_anatomy(shared_network(any_family)).blocks,
        )
    )
    assert found == expected


def test_right_padding_changes_no_real_state(any_family: str) -> None:
    network, tolerance = precise(any_family)
    tolerance = 1e-5 if any_family in FLOAT32_SOFTMAX else tolerance
    ids = torch.randint(3, 97, (1, 14))
    padded = torch.cat([ids, torch.full((1, 5), 7)], dim=1)
    with torch.inference_mode():
        whole = run_decoder(decoder_of(network), ids)
        assert torch.allclose(run_decoder(decoder_of(network), padded)[:, :14], whole, rtol=tolerance, atol=tolerance)


def test_a_bidirectional_model_is_refused() -> None:
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    transformers.logging.set_verbosity_error()
    with pytest.raises(PrunelensError, match="expected a causal decoder"):
        find_anatomy(transformers.BertLMHeadModel(config).eval())


def test_a_post_norm_decoder_is_refused() -> None:
    """OPT-350m normalises the stream itself, so no output is added to it."""
    kind, values = ALL_FAMILIES["opt"]
    network = transformers.OPTForCausalLM(kind(**values | {"do_layer_norm_before": False})).eval()
    with pytest.raises(PrunelensError, match=r"OPTForCausalLM \(family opt\): expected .*layers\.0"):
        find_anatomy(network)


def test_a_residual_of_the_normed_stream_is_refused() -> None:
    kind, values = ALL_FAMILIES["bloom"]
    config = kind(**values | {"apply_residual_connection_post_layernorm": True})
    with pytest.raises(PrunelensError, match=r"BloomForCausalLM \(family bloom\): expected .*h\.0"):
        find_anatomy(transformers.BloomForCausalLM(config).eval())


def test_an_encoder_with_a_decoder_is_refused() -> None:
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    with pytest.raises(PrunelensError, match=r"T5ForConditionalGeneration \(family t5\): expected a causal decoder"):
        find_anatomy(transformers.T5ForConditionalGeneration(config).eval())


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
