"""Cells as a picture of their density: what a scatter plot of a million dots should show, and can't."""

from __future__ import annotations

import numpy as np

PIXELS = 680  # each way: a panel at the resolution of a file
FAINTEST = 0.35  # opacity of a pixel with one cell
MARGIN = 0.03


class Canvas:
    """A square picture over which layers of cells are laid.

    Parameters
    ----------
    xy_n2
        Coordinates of all cells; those of the cells drawn are finite and span the picture.
    drawn
        Cells with coordinates.
    """

    def __init__(self, xy_n2: np.ndarray, drawn: np.ndarray) -> None:
        low, high = xy_n2[drawn].min(axis=0), xy_n2[drawn].max(axis=0)
        margin = np.where(high > low, MARGIN * (high - low), 1)
        self.low, self.high = low - margin, high + margin
        self.pixel_n = np.full(len(xy_n2), -1, dtype=np.int32)
        at = ((xy_n2[drawn] - self.low) / (self.high - self.low) * PIXELS).astype(np.int32)
        self.pixel_n[drawn] = at[:, 1] * PIXELS + at[:, 0]
        self.image = np.ones((PIXELS * PIXELS, 3))

    @property
    def extent(self) -> tuple[float, float, float, float]:
        return float(self.low[0]), float(self.high[0]), float(self.low[1]), float(self.high[1])

    def counts(self, cells: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(self.pixel_n[cells], weights, minlength=PIXELS * PIXELS)

    def lay_plain(self, cells: np.ndarray, color: str) -> None:
        """One colour wherever there is a cell."""
        self.image[self.counts(cells) > 0] = _rgb(color)

    def lay_categories(self, cells: np.ndarray, codes: np.ndarray, colors: list[str]) -> None:
        """A pixel has the mean colour of its cells, and is the fainter the fewer there are.

        Parameters
        ----------
        codes
            Of each of `cells`, into `colors`.
        """
        total, mixed = np.zeros(PIXELS * PIXELS), np.zeros((PIXELS * PIXELS, 3))
        for code, color in enumerate(colors):
            own = cells[codes == code]
            if len(own):
                count = self.counts(own)
                total += count
                mixed += count[:, None] * _rgb(color)
        self._lay(total, mixed / np.maximum(total, 1)[:, None])

    def lay_values(
        self, cells: np.ndarray, values: np.ndarray, scale: str, limits: tuple[float, float]
    ) -> None:
        """A pixel has the colour of its cells' mean value."""
        from matplotlib import colormaps
        from matplotlib.colors import Normalize

        total = self.counts(cells)
        mean = self.counts(cells, values) / np.maximum(total, 1)
        self._lay(total, colormaps[scale](Normalize(*limits)(mean))[:, :3])

    def _lay(self, total: np.ndarray, color_p3: np.ndarray) -> None:
        there = total > 0
        if not there.any():
            return
        # the densest hundredth of the pixels is opaque: one crowded spot must not pale the rest
        full = max(float(np.quantile(total[there], 0.99)), 1.0)
        opacity = FAINTEST + (1 - FAINTEST) * np.minimum(np.log1p(total[there]) / np.log1p(full), 1)
        self.image[there] += opacity[:, None] * (color_p3[there] - self.image[there])

    def picture(self) -> np.ndarray:
        """(height, width, 3), the lowest row first."""
        return self.image.reshape(PIXELS, PIXELS, 3)


def _rgb(color: str) -> np.ndarray:
    from matplotlib.colors import to_rgb

    return np.array(to_rgb(color))
