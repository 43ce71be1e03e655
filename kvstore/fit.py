"""A moving straight-line fit: what a thing costs, learned from what it cost lately.

Costs are sums of a few non-negative parts (so much for each call, so much for each byte), and what was measured long
ago counts less. Plain arithmetic, for a handful of parts.
"""

from __future__ import annotations

from collections.abc import Sequence

RIDGE = 1e-3
"""How strongly the minor parts are pulled to zero where the measurements do not tell the parts apart."""


class MovingFit:
    """Least squares of ``y = sum(c[i] * x[i])`` with all ``c[i] >= 0``, where older measurements fade.

    Parameters
    ----------
    parts : int
        Number of coefficients.
    main : int
        The part that takes the blame where the measurements do not tell the parts apart, for example if all had the
        same size.
    decay : float
        Weight that a measurement keeps when the next one comes.
    """

    def __init__(self, parts: int, main: int, decay: float) -> None:
        self.count = 0
        self._main = main
        self._decay = decay
        self._xx = [[0.0] * parts for _ in range(parts)]
        self._xy = [0.0] * parts
        self._solution: tuple[float, ...] | None = None

    def add(self, x: Sequence[float], y: float, weight: float = 1.0) -> None:
        """Learn from a measurement."""
        for i, one in enumerate(x):
            row = self._xx[i]
            for j, other in enumerate(x):
                row[j] = row[j] * self._decay + weight * one * other
            self._xy[i] = self._xy[i] * self._decay + weight * one * y
        self.count += 1
        self._solution = None

    def scale(self, times: float) -> None:
        """Take what was measured for so many times as much as it was."""
        self._xy = [y * times for y in self._xy]
        self._solution = None

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The parts' costs; all zero before the first measurement."""
        if self._solution is None:
            self._solution = self._solve()
        return self._solution

    def __call__(self, x: Sequence[float]) -> float:
        """What `x` is expected to cost."""
        return sum(c * one for c, one in zip(self.coefficients, x, strict=True))

    def _solve(self) -> tuple[float, ...]:
        active = [i for i in range(len(self._xy)) if self._xx[i][i] > 0]
        while active:
            found = self._solve_for(active)
            lowest = min(range(len(active)), key=found.__getitem__)
            if found[lowest] >= 0:
                out = [0.0] * len(self._xy)
                for i, value in zip(active, found, strict=True):
                    out[i] = value
                return tuple(out)
            del active[lowest]
        return (0.0,) * len(self._xy)

    def _solve_for(self, active: list[int]) -> list[float]:
        """Solve the normal equations of some parts, in units in which each part has size one."""
        scale = [self._xx[i][i] ** 0.5 for i in active]
        rows = []
        for a, i in enumerate(active):
            row = [self._xx[i][j] / scale[a] / scale[b] for b, j in enumerate(active)]
            row[a] += RIDGE if i != self._main else RIDGE * 1e-6
            rows.append([*row, self._xy[i] / scale[a]])
        return [value / scale[a] for a, value in enumerate(_gauss(rows))]


def _gauss(rows: list[list[float]]) -> list[float]:
    """Solve a small positive definite system, given as rows with their right-hand side at the end."""
    size = len(rows)
    for i in range(size):
        for k in range(i + 1, size):
            factor = rows[k][i] / rows[i][i]
            for j in range(i, size + 1):
                rows[k][j] -= factor * rows[i][j]
    out = [0.0] * size
    for i in reversed(range(size)):
        out[i] = (rows[i][size] - sum(rows[i][j] * out[j] for j in range(i + 1, size))) / rows[i][i]
    return out
