"""Pictures of Chinese characters for train_jax and train_torch: drawn from fonts or read from files, and distorted.

A *hand* is a font or a writer. Each of its characters is cut to the ink, fitted into a square, and kept as a field of
signed distances: how far each point is from the edge of the ink, positive inside. A distorted picture is the field seen
through a bent grid, with the edge moved and softened:

- affine: rotation, shear, scales and shift;
- elastic: a smooth random displacement, by cubic splines on a coarse grid;
- stroke width: the edge is where the distance has some value other than 0;
- blur: ink passes into paper within a distance;
- noise: normal, for each pixel.

Everything is drawn from (seed, hand, variant), where a variant is what an epoch sees. Fields and pictures are kept in
files, so that trainings in both frameworks, and after a kill, see the same ones.
"""

import functools
import re
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int8, Int32, Int64, UInt8
from PIL import Image
from scipy import ndimage
from scipy.interpolate import BSpline

from examples.characters.fonts import FetchedFace, FontsError, Ink, level_one
from examples.common import write_array

SIZE = 32  # of a picture that the network sees
FIELD = 48  # of a field of distances: its points lie SIZE / FIELD pixels apart
DRAWN, FILLED = 96, 80  # the square that a character is fitted into before its distances are taken, and its longer side
UNIT = 16  # steps of a distance: fields are int8, in sixteenths of the distance of two points
KNOTS = 5  # of the elastic displacement, in each direction
VERSION = 1  # of drawing and distorting: a change makes files of another name

Fields = Int8[np.ndarray, "N 48 48"]
Pictures = UInt8[np.ndarray, "N 32 32"]
Labels = Int32[np.ndarray, " N"]


class Hand(NamedTuple):
    """The characters of a font or of a writer.

    Args:
        name: for tables.
        style: for tables.
        held_out: whether it is for testing only.
        key: a checksum of what it was made from.
        labels: which character each is, by its place in `level_one()`.
        fields: signed distances, in sixteenths of the distance of two points.
    """

    name: str
    style: str
    held_out: bool
    key: str
    labels: Labels
    fields: Fields


# --- Characters to fields -------------------------------------------------------------------------------------------


def fit(ink: Ink) -> UInt8[np.ndarray, "96 96"]:
    """Return a character cut to its ink and fitted into the square, with its proportions kept.

    Args:
        ink: 255 where there is ink.
    """
    rows, columns = (np.flatnonzero(ink.max(axis=axis) > 127) for axis in (1, 0))
    box = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = (max(1, round(FILLED * side / max(box.shape))) for side in box.shape)
    fitted = Image.fromarray(box).resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    square = np.zeros((DRAWN, DRAWN), np.uint8)
    top, left = (DRAWN - height) // 2, (DRAWN - width) // 2
    square[top : top + height, left : left + width] = fitted
    return square


def distances(ink: UInt8[np.ndarray, "96 96"]) -> Int8[np.ndarray, "48 48"]:
    """Return the field of a character: distances to the edge of the ink, of which four make a point by their mean."""
    inside = ink > 127
    signed = ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside)
    # An edge lies between two pixels, half a pixel from each.
    signed -= np.where(inside, 0.5, -0.5)
    steps = DRAWN // FIELD
    points = signed.reshape(FIELD, steps, FIELD, steps).mean(axis=(1, 3)) / steps
    return np.clip(np.rint(UNIT * points), -128, 127).astype(np.int8)


def field_of(ink: Ink) -> Int8[np.ndarray, "48 48"]:
    """Return the field of a character from a picture of any size, 255 where there is ink.

    Raises:
        ValueError: there is no ink.
    """
    if not np.any(ink > 127):
        raise ValueError("there is no ink")
    return distances(fit(ink))


def font_hand(face: FetchedFace, fonts: Path, characters: int, cache: Path) -> Hand:
    """Return the first characters of a font, drawn now or earlier.

    Args:
        face: of the manifest.
        fonts: the folder of the manifest.
        characters: how many.
        cache: the folder that keeps fields.

    Raises:
        FontsError: the font lacks one of them.
    """
    key = checksum(face.fingerprint, characters, VERSION)

    def draw() -> Fields:
        typeface, wanted = face.typeface(fonts), level_one()[:characters]
        lacking = typeface.lacks(wanted)
        if lacking:
            raise FontsError(f"{face.family} lacks the character {lacking[0]}")
        return np.stack([field_of(typeface.ink(character, DRAWN)) for character in wanted])

    fields = cached(cache / f"{face.name}-{key}.npy", draw)
    return Hand(face.family, face.style, face.held_out, key, np.arange(characters, dtype=np.int32), fields)


# --- Fields to pictures ---------------------------------------------------------------------------------------------


def distort(fields: Fields, seed: Sequence[int]) -> Pictures:
    """Return a distorted picture of each character, 255 where there is ink.

    Args:
        fields: of the characters.
        seed: of NumPy's generator.

    Example:
        >>> field = distances(fit(np.full((10, 40), 255, np.uint8)))
        >>> pictures = distort(np.stack([field, field]), [0])
        >>> pictures.shape, pictures.dtype, bool(np.any(pictures[0] != pictures[1]))
        ((2, 32, 32), dtype('uint8'), True)
    """
    random = np.random.default_rng(seed)
    count = len(fields)
    grid = bent_grid(count, random)
    distance = np.empty((count, SIZE, SIZE), np.float32)
    for field, points, sampled in zip(fields, grid, distance, strict=True):
        ndimage.map_coordinates(field.astype(np.float32), points, sampled, order=1, mode="nearest")
    distance /= UNIT
    thicker = random.uniform(-0.3, 0.8, (count, 1, 1)).astype(np.float32)
    softness = random.uniform(1.0, 2.2, (count, 1, 1)).astype(np.float32)
    noise = random.uniform(0.0, 0.12, (count, 1, 1)).astype(np.float32)
    ink = np.clip(0.5 + (distance + thicker) / softness, 0, 1)
    ink += noise * random.standard_normal(ink.shape, np.float32)
    return np.rint(255 * np.clip(ink, 0, 1)).astype(np.uint8)


def undistorted(fields: Fields) -> UInt8[np.ndarray, "N 48 48"]:
    """Return a picture of each character as it is, of the size of its field, 255 where there is ink."""
    return np.rint(255 * np.clip(0.5 + fields / np.float32(UNIT), 0, 1)).astype(np.uint8)


def axis_points() -> Float32[np.ndarray, " 32"]:
    """Return where the pixels of a picture lie in a field, along an axis."""
    return ((np.arange(SIZE) + 0.5) * (FIELD / SIZE) - 0.5).astype(np.float32)


def bent_grid(count: int, random: np.random.Generator) -> Float32[np.ndarray, "N 2 32 32"]:
    """Return for each pixel where it lies in the field, after an affine and an elastic distortion."""
    centre = (FIELD - 1) / 2
    plain = np.stack(np.meshgrid(*2 * [axis_points() - centre], indexing="ij"))
    angle = random.normal(0, np.deg2rad(4), count)
    cosine, sine = np.cos(angle), np.sin(angle)
    rotation = np.stack([np.stack([cosine, -sine], -1), np.stack([sine, cosine], -1)], -2)
    bent = np.tile(np.eye(2), (count, 1, 1)) + random.normal(0, 0.08, (count, 2, 2)) * (1 - np.eye(2))
    bent /= random.uniform(0.85, 1.1, (count, 1, 2))
    affine = (rotation @ bent).astype(np.float32)
    grid = np.einsum("nij,jyx->niyx", affine, plain.astype(np.float32))
    grid += random.normal(0, 1.2, (count, 2, 1, 1)).astype(np.float32)
    amount = random.uniform(0, 1.6, (count, 1, 1, 1))
    knots = (amount * random.standard_normal((count, 2, KNOTS, KNOTS))).astype(np.float32)
    splines = spline_weights()
    grid += np.einsum("yk,nckl,xl->ncyx", splines, knots, splines, optimize=True)
    return grid + np.float32(centre)


@functools.cache
def spline_weights() -> Float32[np.ndarray, "32 5"]:
    """Return the weights of the knots in the displacement of each pixel, along an axis: cubic B-splines."""
    inner = np.linspace(-1, 1, KNOTS - 2)
    step = inner[1] - inner[0]
    knots = np.concatenate([inner[0] + step * np.arange(-3, 0), inner, inner[-1] + step * np.arange(1, 4)])
    pixels = np.linspace(-1, 1, SIZE, endpoint=False) + 1 / SIZE
    return BSpline.design_matrix(pixels, knots, 3).toarray().astype(np.float32)


# --- Files ----------------------------------------------------------------------------------------------------------


def checksum(*parts: object) -> str:
    """Return a short checksum of what a file was made from."""
    return sha256(repr(parts).encode()).hexdigest()[:16]


def cached(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the array of a file, which is made and written whole if it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_array(path, make())
    return np.load(path, mmap_mode="r")


class Samples:
    """The characters of several hands in one row, and their pictures, which are made as they are asked for."""

    def __init__(self, hands: Sequence[Hand], seed: int, cache: Path) -> None:
        """Keep the hands.

        Args:
            hands: at least one.
            seed: of the distortions.
            cache: the folder that keeps pictures.
        """
        self.hands, self.seed, self.cache = list(hands), seed, cache
        self.labels: Labels = np.concatenate([hand.labels for hand in hands])
        self.ends = np.cumsum([len(hand.labels) for hand in hands])
        self._open: tuple[int, list[Pictures]] | None = None

    def __len__(self) -> int:
        """Return the number of characters."""
        return len(self.labels)

    def hand_of(self, rows: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Return which hand each row is from."""
        return np.searchsorted(self.ends, rows, side="right")

    def pictures(self, hand: Hand, variant: int) -> Pictures:
        """Return the pictures of a hand, distorted now or earlier."""
        key = checksum(hand.key, self.seed, variant, VERSION)
        name = re.sub(r"[^a-z0-9]+", "-", hand.name.lower())
        # Each hand has seeds of its own, whichever others there are.
        seed = [self.seed, variant, int(hand.key, 16)]
        return cached(self.cache / f"{name}-{variant}-{key}.npy", lambda: distort(hand.fields, seed))

    def batch(
        self, rows: Int64[np.ndarray, " n"], variant: int
    ) -> tuple[Float32[np.ndarray, "n 32 32"], Int32[np.ndarray, " n"]]:
        """Return pictures, from 0 to 1, and labels of some rows."""
        if self._open is None or self._open[0] != variant:
            self._open = variant, [self.pictures(hand, variant) for hand in self.hands]
        pictures = np.empty((len(rows), SIZE, SIZE), np.float32)
        starts = self.ends - [len(hand.labels) for hand in self.hands]
        hands = self.hand_of(rows)
        for number in np.unique(hands):
            own = hands == number
            pictures[own] = self._open[1][number][rows[own] - starts[number]]
        pictures /= 255
        return pictures, self.labels[rows]
