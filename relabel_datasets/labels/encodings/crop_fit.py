"""Fit the `compact` form of stored crops to logits: minimize the divergence of the labels plus a price on the stored bits.

The model of the logits of view n and class c is BASE[b_c] + sum over r of u_nr * v_cr * STEP[b_c] + SCALE * d_nc, where all symbols
b, u, v and d are integers, and d is 0 for nearly all classes of a view (see `crop_compact`). The symbols are fitted by gradient
descent (Adam) with straight-through rounding: gradients are those at the rounded symbols. There is no randomness.

Shapes: N views, C classes, R components, K corrections.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .sparse import Floats

Integers = npt.NDArray[np.int64]

# The tables belong to the format. Steps of the base grow towards classes with low probability, whose errors matter less. Steps of
# components grow with a small power of the probability only, since errors in the tail of a label are errors of its sum, too.
_SYMBOLS = np.arange(256, dtype=np.float64)
_FIRST_STEP, _CURVE = 0.12, 0.004  # the base's first step, and half the growth of its steps
BASE = (-_FIRST_STEP * _SYMBOLS - _CURVE * _SYMBOLS**2).astype(np.float32)  # logit of each symbol of the base
STEP = (0.00625 * ((np.exp(BASE.astype(np.float64)) + 1e-3) / 1.001) ** -0.2).astype(np.float32)
SCALE = np.float32(0.5)  # logits per unit of a correction
_SLOPE = (-_FIRST_STEP - 2 * _CURVE * _SYMBOLS).astype(np.float32)  # derivative of BASE
_LOWEST = -50.0  # logits are at least the best of their view plus this
_LARGEST = 127  # of all symbols but the base's

# Choices of the encoder, made on the images of tests/benchmarks/crop_codec.py that its table leaves out.
_NUM_STEPS = 300
_FIRST_SPREAD = 8  # standard deviation of the symbols of the first component
_BITS = np.float32(1.5 / np.log(2))  # a symbol of size s takes about 1.5 * log2(1 + s) bits
_PRICE = np.float32(5e-4)  # nats, summed over views, per bit of coefficients, components and corrections
_CORRECTION_PRICE = 2.5e-3  # nats per correction
_MAX_PER_VIEW = 32  # corrections, except one that keeps the best class
_TIE = 0.05  # the best class is kept if its logit is higher by this
_MAX_PRODUCT = 1 << 17  # multiplications of a matrix product that BLAS computes in one thread
_MAX_CLASSES = 2048  # classes that are fitted; the others keep their mean probability


@dataclass(frozen=True)
class CropSymbols:
    """Symbols of the compact form.

    Attributes:
        base: Symbol of each class, `[C]`, 0 to 255.
        coefs: Coefficients of the components, `[N, R]`, -127 to 127.
        components: Components `[C, R]`, -127 to 127.
        views: View of each correction, `[K]`, ascending.
        classes: Class of each correction, `[K]`.
        corrections: Corrections `[K]`, -127 to 127.
    """

    base: Integers
    coefs: Integers
    components: Integers
    views: Integers
    classes: Integers
    corrections: Integers

    def logits(self) -> Floats:
        """Return the logits `[N, C]`."""
        components = self.components.astype(np.float32) * STEP[self.base, None]
        logits: Floats = BASE[self.base] + _product(self.coefs.astype(np.float32), components.T)
        logits[self.views, self.classes] += self.corrections.astype(np.float32) * SCALE
        return logits


def fit_crops(logits: Floats, num_components: int) -> CropSymbols:
    """Fit symbols to finite logits `[N, C]`, with at most `num_components` components."""
    num_views, num_classes = logits.shape
    floor = np.float32(_LOWEST)
    target = log_softmax(np.maximum(logits - logits.max(1, keepdims=True), floor))
    log_weights = np.log(np.exp(target).mean(0))
    base = _to_base(log_weights - log_weights.max())
    fitted = np.argsort(-log_weights, kind="stable")[:_MAX_CLASSES]
    others = np.ones(num_classes, bool)
    others[fitted] = False
    rest = None
    if others.any():
        rest = np.log(np.exp(BASE[np.rint(base[others]).astype(np.intp)]).sum())
    fit = _Fit(_with_rest(target, fitted, others), base[fitted], rest, min(num_components, num_views - 1))
    for step in range(_NUM_STEPS):
        if step == _NUM_STEPS * 11 // 20:
            fit.choose_corrections()
        fit.descend(step)
    symbols = fit.rounded()
    all_base = np.rint(base).astype(np.int64)
    all_base[fitted] = symbols.base
    components = np.zeros((num_classes, symbols.components.shape[1]), np.int64)
    components[fitted] = symbols.components
    symbols = replace(symbols, base=all_base, components=components, classes=fitted[symbols.classes])
    return _keep_best_classes(symbols, target)


class _Fit:
    """Symbols before rounding, and the state of Adam.

    Args:
        target: Log probabilities `[N, C]`, or `[N, C + 1]` with all other classes as one at the end.
        base: Symbols of the base `[C]` at the start.
        rest: Logit of all other classes as one, which is not fitted, or None.
        num_components: Number of components R.
    """

    def __init__(self, target: Floats, base: Floats, rest: float | None, num_components: int) -> None:
        self.target, self.probs, self.rest = target, np.exp(target), rest
        self.num_classes = num_classes = len(base)
        coefs, components = _weighted_svd(target[:, :num_classes], self.probs[:, :num_classes], num_components)
        self.first_step = STEP[np.rint(base).astype(np.intp), None]
        components = np.clip(components / self.first_step, -30, 30)
        self.views = self.classes = np.zeros(0, np.int64)
        self.values = {"base": base, "coefs": coefs, "components": components, "corrections": np.zeros(0, np.float32)}
        self.rates = {"base": 0.1, "coefs": 0.4, "components": 0.1, "corrections": 0.1}  # per step, in symbols
        self.moments: dict[str, tuple[Floats, Floats, int]] = {}

    def rounded(self) -> CropSymbols:
        base = np.rint(self.values["base"]).astype(np.int64)
        components = self.values["components"] * (self.first_step / STEP[base, None])
        coefs, corrections = self.values["coefs"], self.values["corrections"]
        return CropSymbols(base, _to_int8(coefs), _to_int8(components), self.views, self.classes, _to_int8(corrections))

    def log_probs(self, symbols: CropSymbols) -> Floats:
        logits = symbols.logits()
        if self.rest is not None:
            logits = np.concatenate([logits, np.full((len(logits), 1), self.rest, np.float32)], 1)
        return log_softmax(logits)

    def choose_corrections(self) -> None:
        log_probs = self.log_probs(self.rounded())
        self.views, self.classes = _worst_classes(self.target, log_probs, self.num_classes)
        errors = (self.target - log_probs)[self.views, self.classes]
        self.values["corrections"] = np.clip(errors / SCALE, -30, 30)
        self.moments.pop("corrections", None)

    def descend(self, step: int) -> None:
        symbols, values = self.rounded(), self.values
        error = np.exp(self.log_probs(symbols)) - self.probs  # gradient of the divergence by the logits
        error = error[:, : self.num_classes]
        coefs = symbols.coefs.astype(np.float32)
        components = symbols.components.astype(np.float32) * STEP[symbols.base, None]
        gradients = {
            "base": error.sum(0) * _SLOPE[symbols.base],
            "coefs": _product(components.T, error.T).T + _price(values["coefs"], self.num_classes),
            "components": _product(coefs.T, error).T * self.first_step + _price(values["components"], self.num_classes),
            "corrections": error[self.views, self.classes] * SCALE + _price(values["corrections"], self.num_classes),
        }
        decay = 0.97 ** max(0, step - _NUM_STEPS * 13 // 20)
        for name, gradient in gradients.items():
            self._adam(name, gradient, self.rates[name] * decay)
        np.clip(values["base"], 0, 255, out=values["base"])

    def _adam(self, name: str, gradient: Floats, rate: float) -> None:
        first, second, count = self.moments.get(name, (np.zeros_like(gradient), np.zeros_like(gradient), 0))
        count += 1
        first += np.float32(0.1) * (gradient - first)
        second += np.float32(0.05) * (gradient * gradient - second)
        scale = np.sqrt(second * np.float32(1 / (1 - 0.95**count))) + np.float32(1e-8)
        self.values[name] -= first * np.float32(rate / (1 - 0.9**count)) / scale
        self.moments[name] = first, second, count


def _weighted_svd(target: Floats, probs: Floats, num_components: int) -> tuple[Floats, Floats]:
    """Return coefficients `[N, R]` and components `[C, R]` of the logits minus their base, weighted by probability."""
    weights = probs.mean(0)
    rest = target - np.log(weights)
    rest -= (probs * rest).sum(1, keepdims=True)
    root = np.sqrt(weights + np.float32(1e-7))
    left, energies, right = np.linalg.svd((rest * root).astype(np.float64), full_matrices=False)
    left, energies, right = left[:, :num_components], energies[:num_components], right[:num_components]
    left = left * np.where(left[np.abs(left).argmax(0), np.arange(left.shape[1])] < 0, -1, 1)
    right = left.T @ (rest * root)
    spread = _FIRST_SPREAD * np.sqrt(len(target) * np.maximum(energies, 1e-9) / energies.max(initial=1e-9))
    shrink = weights / (weights + np.float32(1e-3)) / root  # components of improbable classes would fit noise
    # In half precision, so that the last bits of sums, which depend on the number of threads, do not matter.
    coefs = (left * spread).astype(np.float16).astype(np.float32)
    components = ((right / spread[:, None]).T * shrink[:, None]).astype(np.float16).astype(np.float32)
    return coefs, components


def _worst_classes(target: Floats, log_probs: Floats, num_classes: int) -> tuple[Integers, Integers]:
    """Return views and classes whose correction lowers the divergence by more than its price, chosen greedily per view."""
    almost = np.float32(1 - 1e-6)
    chosen = np.zeros(target.shape, bool)
    chosen[:, num_classes:] = True
    rows, log_probs = np.arange(len(target)), log_probs.copy()
    log_others = np.log1p(-np.minimum(np.exp(target), almost))
    for _ in range(_MAX_PER_VIEW):
        # Gain of the exact probability of one class, if the odds among the others do not change.
        wanted, stored, wanted_others = target[rows], log_probs[rows], log_others[rows]
        stored_others = np.log1p(-np.minimum(np.exp(stored), almost))
        gains = np.exp(wanted) * (wanted - stored) + np.exp(wanted_others) * (wanted_others - stored_others)
        gains[chosen[rows]] = 0
        classes = gains.argmax(1)
        index = np.flatnonzero(gains.max(1) > _CORRECTION_PRICE * _price_factor(num_classes))
        if not len(index):
            break
        rows, classes = rows[index], classes[index]
        chosen[rows, classes] = True
        log_probs[rows, classes] = (target - log_others)[rows, classes] + stored_others[index, classes]
        log_probs[rows] = log_softmax(log_probs[rows])
    views, classes = np.nonzero(chosen[:, :num_classes])
    return views, classes


def _keep_best_classes(symbols: CropSymbols, target: Floats) -> CropSymbols:
    """Correct the best class of views whose stored labels would have another one, and drop corrections of 0."""
    dense = np.zeros(target.shape, np.int64)
    dense[symbols.views, symbols.classes] = symbols.corrections
    logits, best = symbols.logits(), target.argmax(1)
    views = np.arange(len(best))
    wrong = np.flatnonzero(target[views, best] > target[views, logits.argmax(1)] + np.float32(_TIE))
    best = best[wrong]
    behind = logits[wrong].max(1) - logits[wrong, best]
    dense[wrong, best] = np.minimum(dense[wrong, best] + np.floor(behind / SCALE).astype(np.int64) + 1, _LARGEST)
    views, classes = np.nonzero(dense)
    return replace(symbols, views=views, classes=classes, corrections=dense[views, classes])


def _with_rest(target: Floats, fitted: Integers, others: npt.NDArray[np.bool_]) -> Floats:
    """Return the log probabilities of the fitted classes, and at the end of all others as one if there are any."""
    if not others.any():
        return target[:, fitted]
    rest = np.log(np.exp(target[:, others]).sum(1, keepdims=True))
    return np.concatenate([target[:, fitted], rest], 1)


def _to_base(logits: Floats) -> Floats:
    """Return the symbols, before rounding, of logits of at most 0: the inverse of BASE."""
    root = np.sqrt(_FIRST_STEP**2 - 4 * _CURVE * logits.astype(np.float64))
    return ((root - _FIRST_STEP) / (2 * _CURVE)).astype(np.float32)


def _to_int8(symbols: Floats) -> Integers:
    return np.clip(np.rint(symbols), -_LARGEST, _LARGEST).astype(np.int64)


def _price(symbols: Floats, num_classes: int) -> Floats:
    """Return the derivative of the price of symbols."""
    price = _PRICE * _BITS * np.float32(_price_factor(num_classes))
    gradient: Floats = np.sign(symbols) * price / (1 + np.abs(symbols))
    return gradient


def _price_factor(num_classes: int) -> float:
    """Return the factor of all prices: labels of few classes are stored more exactly, since they take few bytes anyway."""
    return min(1.0, num_classes / 1000)


def _product(left: Floats, right: Floats) -> Floats:
    """Return `left @ right`, computed in blocks that are too small for BLAS to use several threads.

    The last bits of larger products depend on the number of threads, and so would the symbols.
    """
    result = np.empty((left.shape[0], right.shape[1]), np.float32)
    width = max(1, _MAX_PRODUCT // max(1, left.size))
    for start in range(0, right.shape[1], width):
        block = slice(start, start + width)
        np.matmul(left, right[:, block], out=result[:, block])
    return result


def log_softmax(logits: Floats) -> Floats:
    shifted: Floats = logits - logits.max(1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(1, keepdims=True))
    return shifted
