"""What `inspect` found in a model, as plain data: blocks, sublayers, norms and head."""

from typing import Any

from prunelens.models.model import Model


def describe_anatomy(model: Model) -> dict[str, Any]:
    """Family, shape, and the parts of a model by name."""
    anatomy, config = model.anatomy, model.network.config
    return {
        "name": model.name,
        "family": config.model_type,
        "fingerprint": model.fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "parameters": sum(weight.numel() for weight in model.network.parameters()),
        "hidden_size": anatomy.hidden_size,
        "vocab_size": anatomy.vocab_size,
        "context_length": model.context_length,
        "chat_template": getattr(model.tokenizer, "chat_template", None) is not None,
        "decoder": anatomy.decoder,
        "final_norm": anatomy.final_norm,
        "head": anatomy.head,
        "notes": model.notes,
        "blocks": [
            {
                "layer_idx": block.layer_idx,
                "name": block.name,
                "layout": block.layout,
                "sublayers": [
                    {
                        "kind": part.kind,
                        "name": part.name,
                        "class": type(part.body[0]).__name__,
                        "norms": list(part.norms),
                        "scale": part.scale,
                        "adds_residual": part.adds_residual,
                        "parameters": sum(weight.numel() for module in part.body for weight in module.parameters()),
                    }
                    for part in block.sublayers
                ],
            }
            for block in anatomy.blocks
        ],
    }
