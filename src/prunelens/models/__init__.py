"""What a model is: open it, find its parts, take them out, read the stream inside."""

import logging

# what torchao remarks when transformers looks whether it is there: kernels for devices that this machine lacks
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
