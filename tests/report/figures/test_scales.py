"""Colour scales of heat maps: ends, ticks and what a few tiny values do; settings in words."""

import numpy as np
import pytest

from prunelens.report.figures.scales import Scale, scale_key, scale_of
from prunelens.report.wording import setting


def test_a_colour_scale_has_ends_and_ticks() -> None:
    values = np.append(np.geomspace(0.02, 50, 99), [0.0, np.nan])
    scale = scale_of(values[:50], values[50:])
    assert scale is not None
    assert (scale.low, scale.high, scale.clipped) == (values[0], values[98], False)
    key = scale_key("KL, nats", scale)
    assert key.ends == ("0.020", "50")
    assert [value for _, value in key.ticks] == ["0.1", "1", "10"]
    at = 100 * (1 - np.log10(0.02)) / (np.log10(50) - np.log10(0.02))
    assert key.ticks[2][0] == pytest.approx(at, abs=0.05)


def test_a_few_tiny_values_share_the_first_colour() -> None:
    values = np.append(np.geomspace(0.02, 50, 99), 1e-9)
    scale = scale_of(values)
    assert scale is not None
    assert scale.low >= 0.02
    assert scale_key("KL", scale).ends[0].startswith("≤ 0.02")
    assert scale_of(np.array([1e-12, 1.0])) == Scale(1e-6, 1.0, True)
    assert scale_of(np.array([3.0])) == Scale(0.3000, 3.0)
    assert scale_of(np.zeros(4)) is None
    assert scale_key("KL", None).name == "KL: every value is exactly 0"


def test_settings_read_like_words() -> None:
    assert [setting(value) for value in (None, [], True, False, 0, ["a", "b"], "normed")] == [
        "—",
        "—",
        "yes",
        "no",
        "0",
        "a, b",
        "normed",
    ]
