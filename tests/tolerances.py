# SPDX-License-Identifier: Apache-2.0
"""How far a correct result may lie from the exact one: derived, never tuned.

A step is compared with the oracle's step *from the implementation's own previous tensors*, which convert to
float64 exactly. So errors do not compound over steps, and the bound of one step is the only number there is.

`Rounded` carries a value and an interval in which what the registers hold must lie, through the operations of
the oracle's rule: interval arithmetic, widened by each operation's own rounding (Higham, Accuracy and Stability
of Numerical Algorithms, 2.2 and 26.4). With u the unit roundoff of the registers (2^-24 for fp32, 2^-53 for
fp64) and eta their smallest subnormal, an operation whose exact result is x returns x*(1+d) + e with |d| <= u
and |e| <= eta. Sums, differences, products, quotients and roots round; max, min and negation do not.

A hyperparameter is computed in double (a handful of roundings of 2^-53, magnified by the condition of the
difference 1-b^t) and rounded once to the registers' type. A fused multiply-add rounds once less: it stays
inside. Storing adds half a unit in the last place of the storage dtype, which is nothing where the registers
have that dtype already.

So the bound follows from the number of roundings in the formula and from the size of each term: where the
decayed parameter and its update cancel, the bound stays at an ulp of the terms, as it must.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# dtype -> (bits of significand with the hidden one, smallest normal exponent)
FORMATS = {
    torch.float64: (53, -1022),
    torch.float32: (24, -126),
    torch.float16: (11, -14),
    torch.bfloat16: (8, -126),
}
# lr/(1-b^t) in double: one ulp (two units) in pow, one unit in the difference, one in the quotient
HYPER_ROUNDINGS = 4


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to its successor."""
    return 2.0 ** -FORMATS[dtype][0]


def smallest_subnormal(dtype: torch.dtype) -> float:
    bits, exponent = FORMATS[dtype]
    return 2.0 ** (exponent - bits + 1)


def ulp(x: Any, dtype: torch.dtype) -> np.ndarray:
    """The distance between neighbours of `dtype` at |x|."""
    bits, smallest = FORMATS[dtype]
    x = np.abs(np.asarray(x, np.float64))
    _, exponent = np.frexp(x)  # |x| = f * 2^exponent, f in [1/2, 1)
    return np.ldexp(1.0, np.maximum(np.where(x == 0, smallest, exponent - 1), smallest) - (bits - 1))


def compute_dtype(storage: torch.dtype) -> torch.dtype:
    """fp64 parameters are computed in fp64, all others in fp32."""
    return torch.float64 if storage == torch.float64 else torch.float32


@dataclass(frozen=True)
class Rounding:
    """The arithmetic of the registers."""

    unit: float
    eta: float

    @classmethod
    def of(cls, registers: torch.dtype) -> Rounding:
        return cls(unit_roundoff(registers), smallest_subnormal(registers))

    @property
    def wider(self) -> type[np.floating]:
        """A type whose own roundings do not matter beside these."""
        return np.float64 if self.unit > 2.0**-53 else np.longdouble


class Rounded:
    """A value, and the interval in which the registers hold it."""

    __slots__ = ("high", "low", "rounding", "value")

    def __init__(self, value: Any, low: Any, high: Any, rounding: Rounding) -> None:
        self.value, self.low, self.high = (np.asarray(x, rounding.wider) for x in (value, low, high))
        self.rounding = rounding

    @classmethod
    def known(cls, value: Any, rounding: Rounding) -> Rounded:
        """A tensor's elements, which the registers hold exactly."""
        return cls(value, value, value, rounding)

    @classmethod
    def within(cls, value: Any, relative: Any, rounding: Rounding) -> Rounded:
        """A number known up to a relative error."""
        spread = abs(value) * relative + rounding.eta
        return cls(value, value - spread, value + spread, rounding)

    @classmethod
    def scalar(cls, rounding: Rounding) -> Any:
        """Rounds a hyperparameter: computed in double, rounded once."""

        def round_once(value: Any, condition: Any = 1.0) -> Rounded:
            relative = rounding.unit + condition * HYPER_ROUNDINGS * unit_roundoff(torch.float64)
            return cls.within(value, relative, rounding)

        return round_once

    @property
    def error(self) -> Any:
        """The absolute bound: the farther end of the interval."""
        return np.maximum(self.high - self.value, self.value - self.low)

    def _operand(self, other: Any) -> Rounded:
        return other if isinstance(other, Rounded) else Rounded.known(other, self.rounding)

    def _rounded(self, value: Any, *ends: Any) -> Rounded:
        """The hull of the ends, widened by one rounding."""
        low, high = np.minimum.reduce(ends), np.maximum.reduce(ends)
        unit, eta = self.rounding.unit, self.rounding.eta
        return Rounded(value, low - unit * np.abs(low) - eta, high + unit * np.abs(high) + eta, self.rounding)

    def __add__(self, other: Any) -> Rounded:
        b = self._operand(other)
        return self._rounded(self.value + b.value, self.low + b.low, self.high + b.high)

    def __sub__(self, other: Any) -> Rounded:
        return self + -self._operand(other)

    def __mul__(self, other: Any) -> Rounded:
        b = self._operand(other)
        ends = (self.low * b.low, self.low * b.high, self.high * b.low, self.high * b.high)
        return self._rounded(self.value * b.value, *ends)

    def __truediv__(self, other: Any) -> Rounded:
        b = self._operand(other)
        if not np.all((b.low > 0) | (b.high < 0)):
            raise ValueError("no bound: the divisor may be zero; choose a case with eps > 0")
        ends = (self.low / b.low, self.low / b.high, self.high / b.low, self.high / b.high)
        return self._rounded(self.value / b.value, *ends)

    def __rtruediv__(self, other: Any) -> Rounded:
        return self._operand(other) / self

    def __neg__(self) -> Rounded:
        return Rounded(-self.value, -self.high, -self.low, self.rounding)

    def sqrt(self) -> Rounded:
        ends = (np.sqrt(np.maximum(self.low, 0)), np.sqrt(np.maximum(self.high, 0)))
        root = self._rounded(np.sqrt(self.value), *ends)
        root.low = np.maximum(root.low, 0)  # a root is never rounded across zero
        return root

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *operands: Any) -> Any:
        """numpy's ufuncs, so that the oracle's lines need not know what they are given."""
        if method != "__call__":
            return NotImplemented
        a, *rest = (self._operand(x) for x in operands)
        if ufunc is np.sqrt:
            return a.sqrt()
        (b,) = rest
        if ufunc in (np.maximum, np.minimum):  # monotone in both, and never rounded
            return Rounded(ufunc(a.value, b.value), ufunc(a.low, b.low), ufunc(a.high, b.high), self.rounding)
        if ufunc is np.add:
            return a + b
        if ufunc is np.subtract:
            return a - b
        if ufunc is np.multiply:
            return a * b
        return a / b if ufunc is np.divide else NotImplemented

    def stored(self, dtype: torch.dtype) -> np.ndarray:
        """The absolute bound once the value lies in a tensor of `dtype`."""
        if unit_roundoff(dtype) <= self.rounding.unit:
            return np.broadcast_to(self.error, self.value.shape)
        size = np.maximum(np.abs(self.low), np.abs(self.high))
        error = self.error + ulp(size, dtype) / 2
        if unit_roundoff(dtype) > unit_roundoff(torch.float32) > self.rounding.unit:
            error = error + ulp(size, torch.float32) / 2  # float64 becomes 16 bits by way of float32, as in torch
        return error


def norm_bound(count: int, registers: torch.dtype) -> float:
    """The relative bound of a 2-norm over `count` elements, accumulated in `registers` or better.

    The terms are positive, so a sum in any order is off by at most (count - 1)*u, a square by u, the final
    root by u and half of what is below it. Rounding errors of independent signs add like a random walk instead
    (Higham and Mary 2019, "A new approach to probabilistic rounding error analysis"): lambda*sqrt(count)*u
    fails with a probability of 2*exp(-lambda^2/2), 1e-13 at lambda = 8. The smaller of the two holds.
    """
    u = unit_roundoff(registers)
    walk = min(float(count), 8 * count**0.5)
    return u * ((walk + 1) / 2 + 2)
