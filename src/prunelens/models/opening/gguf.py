"""Read a GGUF file: its weights are dequantised, its tokenizer is put together from its metadata."""

import functools
import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from prunelens.errors import PrunelensError
from prunelens.models.opening.checkpoint import check_complete
from prunelens.models.opening.quiet import explained, quiet
from prunelens.models.placement import DISK, Placement, place

ON_CPU = Placement(torch.device("cpu"))


def read_gguf(path: Path, dtype: torch.dtype = torch.float32, placement: Placement = ON_CPU) -> tuple[Any, Any]:
    """Read and dequantise a GGUF file: (network, tokenizer). Without a map of devices it stays on the CPU.

    Raises:
        PrunelensError: not a GGUF file, damaged, or an architecture transformers cannot read.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise PrunelensError(f"expected a GGUF file, but {path} does not begin with GGUF; download it again")
    if isinstance(placement.device_map, dict) and DISK in placement.device_map.values():
        raise PrunelensError(
            f"a map of devices cannot put parts of the GGUF file {path} on disk; pass --device auto, or convert it "
            "to a folder of safetensors"
        )
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    what = f"{path} could not be read as a GGUF checkpoint, download it again or check its kind"
    with quiet(), redirect_stderr(io.StringIO()), explained(what):  # its progress bar knows no other switch
        opener = functools.partial(
            AutoModelForCausalLM.from_pretrained,
            **source,
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype,
            output_loading_info=True,
        )
        network, found = place(placement, opener)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    check_complete(found, path)
    network.config.quantization_config = None
    del network.config.quantization_config
    return network, tokenizer
