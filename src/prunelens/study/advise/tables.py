"""The result of a search for the strongest recipe that keeps a use."""

import pyarrow as pa

from prunelens.study.advise.record import AdviceInfo
from prunelens.study.evaluate.words import renewed
from prunelens.study.store import Kind

SCHEMAS = {
    "tried": pa.schema(
        [
            ("recipe", pa.string()),
            ("family", pa.string()),
            ("size", pa.float64()),
            ("parameters_saved", pa.float64()),
            ("bytes_saved", pa.float64()),
            ("zeros", pa.float64()),
            ("kl", pa.float64()),
            ("loss", pa.float64()),
            ("keeps", pa.bool_()),
            ("number", pa.string()),
        ]
    ),
    "held_out": pa.schema(
        [
            ("recipe", pa.string()),
            ("role", pa.string()),
            ("prompt_id", pa.string()),
            ("kl", pa.float64()),
        ]
    ),
}
"""`tried`: what the search measured; `held_out`: mean KL on each prompt that the search did not see."""

ADVICE = Kind(
    "prunelens-advice",
    2,
    SCHEMAS,
    ("dense", "aim", "chosen", "held_out", "verdicts"),
    "advice folder",
    "advise",
    AdviceInfo,
    renew=renewed,
)
