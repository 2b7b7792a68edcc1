"""Row statistics of two rows of logits: the logit space (Z1, Z2) and the probability space (P1-P3, T2-T3+, A1, S1).

Everything follows from the dense log-probabilities la = log p, the log-ratio d = log p' - log p and the
difference e = p' - p. Both differences vanish exactly for equal logits, a common shift of the logits drops
out before anything is summed, and small quantities are not obtained as differences of large ones. All sums
are float64. On a CPU, fresh memory costs more than arithmetic, so six buffers of (rows, V) are reused.
"""

import math

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from prunelens.metrics.top_ids import top_ids
from prunelens.metrics.vectors import cosine_from_split

TOP_K = 10
UNDERFLOW = 1e-280
ZEROS = (
    *("logit_alpha", "logit_rho", "logit_rms_delta", "logit_var_uniform"),
    *("kl_dense_compressed", "kl_compressed_dense", "js", "tv", "delta_p_top1", "delta_p_token"),
    *("prob_deviation_estimate", "kl_estimate", "kl_estimate_third", "trust"),
)
"""Columns that are 0 for a model compared with itself."""


def pair_stats(
    dense: Float[Tensor, "rows V"],
    compressed: Float[Tensor, "rows V"],
    token_ids: Int64[Tensor, " rows"],
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """All row statistics of the logit and probability spaces for one pair of models.

    Args:
        dense: the dense model's logits, (rows, V), any floating dtype.
        compressed: the compressed model's logits on the same contexts, (rows, V).
        token_ids: the reference token of each row, for `delta_p_token` and `acceptance`.
        temperature: T of the softmax, > 0.

    Returns:
        See `PairedRows.compare`.

    Raises:
        ValueError: logits that are NaN or infinite.
    """
    num_rows, num_tokens = dense.shape
    rows = PairedRows(num_rows, num_tokens, temperature, dense.device)
    rows.set_dense(dense)
    return rows.compare(compressed, token_ids)


class PairedRows:
    """Buffers for up to `rows` rows of a vocabulary of `num_tokens`, with the dense model's rows in them."""

    def __init__(self, rows: int, num_tokens: int, temperature: float, device: torch.device) -> None:
        self.temperature = temperature
        self._buffers = torch.empty(6, rows, num_tokens, dtype=torch.float64, device=device)
        self.top_ids = torch.empty(0, dtype=torch.int64)

    def fits(self, rows: int, logits: Tensor) -> bool:
        """Whether so many rows like these can be held."""
        _, held, num_tokens = self._buffers.shape
        return rows <= held and num_tokens == logits.shape[1] and self._buffers.device == logits.device

    def set_dense(self, logits: Float[Tensor, "rows V"]) -> None:
        """Take rows of the dense model's logits; every later `compare` refers to them.

        Raises:
            ValueError: logits that are NaN or infinite.
        """
        self._la, self._p, self._d, self._e, self._scratch, self._product = self._buffers[:, : logits.shape[0]]
        self.top_ids = top_ids(logits, TOP_K)
        self._margin = _margin(logits, self.top_ids)
        self._shift = self._normalise(logits, self.top_ids[:, :1], self._la, self._p)
        la, p = self._la, self._p
        self._mean_la = la.mean(-1)
        self._var_la = _squares(la) / la.shape[-1] - self._mean_la**2
        self._entropy = -self._dot(p, la)
        self._squared_p = _squares(p)

    def compare(self, logits: Float[Tensor, "rows V"], token_ids: Int64[Tensor, " rows"]) -> dict[str, Tensor]:
        """Compare rows of a compressed model's logits with the dense rows.

        Returns:
            One tensor of shape (rows,) per column of `steps.parquet` (units: nats for divergences and
            entropies, logits for `logit_rms_delta`, dimensionless otherwise), `log_ratio_token` (log p'/p of
            the reference token, nats), `margin` and `margin_compressed` (difference of the two highest
            logits, C1), and for the most likely tokens `top_ids_compressed`, `top_probs_compressed`,
            `top_probs_dense` (rows, k). Undefined ratios are NaN.

        Raises:
            ValueError: logits that are NaN or infinite.
        """
        compressed_ids = top_ids(logits, TOP_K)
        shift = self._normalise(logits, compressed_ids[:, :1], self._d, self._e)
        entropy_compressed = -self._dot(self._d, self._e)
        torch.mul(self._p, self._e, out=self._product)
        self._subtract_dense()
        mixed_log_cosh = self._mixed_log_cosh()
        stats = self._decisions(logits, compressed_ids, token_ids)
        moments = self._moments()
        stats |= self._logit_stats(shift - self._shift + moments["mean_p"])
        stats |= self._estimates(moments)
        stats |= self._divergences(moments["mean_p"], mixed_log_cosh, entropy_compressed)
        stats["amplification"] = _ratio(stats.pop("prob_deviation"), stats.pop("logit_deviation"))
        stats["amplification_estimate"] = _ratio(moments["var_r"], stats["logit_rho"] ** 2)
        return stats

    def divergences(self, logits: Float[Tensor, "rows V"]) -> dict[str, Tensor]:
        """Only `kl_dense_compressed` (nats) and `tv` (P2) of rows of a compressed model's logits, (rows,) each.

        Raises:
            ValueError: logits that are NaN or infinite.
        """
        self._normalise(logits, logits.argmax(-1, keepdim=True), self._d, self._e)
        self._subtract_dense()
        kl = self._e.sum(-1) - self._dot(self._p, self._d)
        return {"kl_dense_compressed": kl.clamp_min(0), "tv": self._tv()}

    def identical(self) -> dict[str, Tensor]:
        """The columns of `compare` for a model with the dense model's own logits, without computing them."""
        return identical_stats(self._entropy)

    def _subtract_dense(self) -> None:
        self._d -= self._la
        self._e -= self._p

    def _tv(self) -> Tensor:
        return 0.5 * torch.abs(self._e, out=self._scratch).sum(-1)

    def _normalise(self, logits: Tensor, top1: Tensor, log_probs: Tensor, probs: Tensor) -> Tensor:
        """Write log p and p of the rows; return z/T - log p, one number a row."""
        highest = logits.gather(1, top1).double() / self.temperature
        log_probs.copy_(logits)
        if self.temperature != 1.0:
            log_probs /= self.temperature
        log_probs -= highest
        total = torch.exp(log_probs, out=probs).sum(-1, keepdim=True)
        if not bool(torch.isfinite(total).all()):
            raise ValueError("logits hold NaN or infinite values")
        log_total = total.log()
        log_probs -= log_total
        probs /= total
        return (highest + log_total).squeeze(-1)

    def _dot(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.mul(x, y, out=self._scratch).sum(-1)

    def _moments(self) -> dict[str, Tensor]:
        """Mean of d under p, then central moments under p and under r = p²/‖p‖²; leaves d centred."""
        p, d = self._p, self._d
        mean_p = self._dot(p, d)
        d -= mean_p.unsqueeze(-1)
        pd = torch.mul(p, d, out=self._product)
        pdd = torch.mul(pd, d, out=self._scratch)
        var_p, third_p = pdd.sum(-1), pdd.mul_(d).sum(-1)
        mean_r = self._dot(pd, p) / self._squared_p
        raw2_r = _squares(pd) / self._squared_p
        return {"mean_p": mean_p, "var_p": var_p, "third_p": third_p, "var_r": (raw2_r - mean_r**2).clamp_min(0)}

    def _logit_stats(self, d_shift: Tensor) -> dict[str, Tensor]:
        """Z1 and Z2, from z/T = la + shift and Δz/T = d + d_shift with means taken out first."""
        d, num_tokens = self._d, self._d.shape[-1]
        mean_la, var_la, mean_d = self._mean_la, self._var_la, d.mean(-1)
        var_d = (_squares(d) / num_tokens - mean_d**2).clamp_min(0)
        covariance = self._dot(self._la, d) / num_tokens - mean_la * mean_d
        mean_z, mean_delta = mean_la + self._shift, mean_d + d_shift
        squared = var_la + mean_z**2
        delta_squared = var_d + mean_delta**2
        alpha = (covariance + mean_z * mean_delta) / squared
        rho_squared = (delta_squared / squared - alpha**2).clamp_min(0)
        cosine, deviation = cosine_from_split(alpha, rho_squared)
        alpha_centered = covariance / var_la
        rho_squared_centered = (var_d / var_la - alpha_centered**2).clamp_min(0)
        return {
            "logit_cosine": cosine,
            "logit_alpha": alpha,
            "logit_rho": torch.sqrt(rho_squared),
            "logit_cosine_centered": cosine_from_split(alpha_centered, rho_squared_centered)[0],
            "logit_rms_delta": self.temperature * torch.sqrt(delta_squared),
            "logit_var_uniform": self.temperature**2 * var_d,
            "logit_deviation": deviation,
        }

    def _estimates(self, moments: dict[str, Tensor]) -> dict[str, Tensor]:
        """T2, T3 and T3+ from the moments of d = Δz/T - const; the temperature is already inside."""
        var_p, third = moments["var_p"], moments["third_p"]
        return {
            "prob_deviation_estimate": moments["var_r"] / 2,
            "kl_estimate": var_p / 2,
            "kl_estimate_third": var_p / 2 + third / 6,
            "trust": torch.where(var_p == 0, 0.0, third.abs() / (3 * var_p)),
        }

    def _divergences(self, mean_d: Tensor, mixed_log_cosh: Tensor, entropy_compressed: Tensor) -> dict[str, Tensor]:
        """P1, P2 and the entropies; nats.

        KL(p‖p') = Σ(p' - p - p·d), every term of which is positive; the sum of both directions is Σe·d; and
        JS = ¼Σe·d - ½Σ(p+p')·log cosh(d/2).
        """
        p, d, e = self._p, self._d, self._e
        sum_e = e.sum(-1)
        both_kl = self._dot(e, d) + mean_d * sum_e
        alpha = self._dot(p, e) / self._squared_p
        rho_squared = (_squares(e) / self._squared_p - alpha**2).clamp_min(0)
        cosine, deviation = cosine_from_split(alpha, rho_squared)
        tv = self._tv()
        js = 0.25 * both_kl - 0.5 * mixed_log_cosh
        if not bool(torch.isfinite(js).all()):  # log cosh overflows for |d| > 1400
            half = torch.add(p, e, alpha=0.5)
            js = -torch.xlogy(half, half).sum(-1) - 0.5 * (self._entropy + entropy_compressed)
        return {
            "prob_cosine": cosine,
            "kl_dense_compressed": (sum_e - mean_d).clamp_min(0),
            "kl_compressed_dense": (both_kl + mean_d - sum_e).clamp_min(0),
            "js": js.clamp_min(0),
            "tv": tv,
            "entropy_dense": self._entropy,
            "entropy_compressed": entropy_compressed,
            "prob_deviation": deviation,
        }

    def _mixed_log_cosh(self) -> Tensor:
        """Σ(p+p')·log cosh(d/2), from 4·cosh²(d/2) = (p+p')²/(p·p') where that does not underflow."""
        p, d, e, product = self._p, self._d, self._e, self._product
        if float(product.amin()) > UNDERFLOW:
            twice = torch.mul(e, e, out=self._scratch).div_(product).mul_(0.25).log1p_()
        else:
            twice = torch.mul(d, 0.25, out=self._scratch).sinh_().square_().mul_(2).log1p_().mul_(2)
        return twice.mul_(torch.add(e, p, alpha=2, out=product)).sum(-1) / 2

    def _decisions(self, logits: Tensor, compressed_ids: Tensor, token_ids: Tensor) -> dict[str, Tensor]:
        """P3, the acceptance of the reference token (S1), and the most likely tokens of both models."""
        top1, token = self.top_ids[:, :1], token_ids.unsqueeze(-1)
        overlap = (self.top_ids.unsqueeze(-1) == compressed_ids.unsqueeze(-2)).any(-1)
        log_ratio = self._d.gather(1, token).squeeze(-1)
        return {
            "same_top1": (top1 == compressed_ids[:, :1]).squeeze(-1),
            "rank_of_dense_top1": _rank(logits, compressed_ids, logits.gather(1, top1)),
            "topk_overlap": overlap.double().mean(-1),
            "delta_p_top1": self._e.gather(1, top1).squeeze(-1),
            "delta_p_token": self._e.gather(1, token).squeeze(-1),
            "acceptance": log_ratio.clamp_max(0).exp(),
            "log_ratio_token": log_ratio,
            "top_ids_compressed": compressed_ids,
            "top_probs_compressed": self._p.gather(1, compressed_ids) + self._e.gather(1, compressed_ids),
            "top_probs_dense": self._p.gather(1, self.top_ids),
            "margin": self._margin,
            "margin_compressed": _margin(logits, compressed_ids),
        }


def identical_stats(entropy: Float64[Tensor, " rows"]) -> dict[str, Tensor]:
    """The columns of `PairedRows.compare` for equal logits, from the entropy of their rows (nats)."""
    zero, one = torch.zeros_like(entropy), torch.ones_like(entropy)
    ones = ("logit_cosine", "logit_cosine_centered", "prob_cosine", "topk_overlap", "acceptance")
    undefined = dict.fromkeys(("amplification", "amplification_estimate"), zero / 0)
    decided = {"same_top1": one.bool(), "rank_of_dense_top1": one.long()}
    entropies = dict.fromkeys(("entropy_dense", "entropy_compressed"), entropy)
    return dict.fromkeys(ZEROS, zero) | dict.fromkeys(ones, one) | undefined | decided | entropies


def _squares(x: Tensor) -> Tensor:
    """Σx² of each row, without a product of the same size."""
    return torch.linalg.vector_norm(x, dim=-1).square_()


def _rank(logits: Tensor, highest_ids: Tensor, value: Tensor) -> Tensor:
    """The place of a value (rows, 1) in its row, from the highest ones alone where it is among them."""
    highest = logits.gather(1, highest_ids)
    above = (highest > value).sum(-1)
    for row in (value < highest[:, -1:]).squeeze(-1).nonzero().flatten().tolist():
        above[row] = (logits[row] > value[row]).sum()
    return above + 1


def _margin(logits: Tensor, top_ids: Tensor) -> Tensor:
    best = logits.gather(1, top_ids[:, :2]).double()
    return best[:, 0] - best[:, -1]


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, math.nan)
