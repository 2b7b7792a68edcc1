"""The fingerprint of a checkpoint's files without opening the model."""

from prunelens.models.checkpoint import check_files, weight_files
from prunelens.models.fingerprint import code_of, fingerprint_files
from prunelens.models.sources import resolve_name


def identify(name: str) -> str:
    """A name for the content of a checkpoint, from its configuration file and its weights.

    It differs from `Model.fingerprint`, for which the configuration is completed by transformers.

    Raises:
        PrunelensError: nothing there, or a damaged checkpoint.
    """
    path = resolve_name(name)
    if path.suffix == ".gguf":
        return fingerprint_files([path], {})
    values = check_files(path)
    return fingerprint_files(weight_files(path, values), values | code_of(path, values))
