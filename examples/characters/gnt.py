"""Reads handwritten characters from the .gnt files of CASIA-HWDB, for train_jax and train_torch.

A file is a row of samples, by one writer in HWDB 1.0 to 1.2:

    bytes   what
    4       size of the sample with these ten bytes, little-endian
    2       the character, in GB 2312
    2, 2    width and height, little-endian
    w h     grey levels by rows, 255 for paper

A file that ends within a sample, or whose sizes contradict each other, is an error that names file and byte. The
samples before it are not lost: the error has them.

References:
    Liu et al., "CASIA Online and Offline Chinese Handwriting Databases", 2011.
"""

import struct
from collections import Counter
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from examples.characters.fonts import level_one
from examples.characters.images import VERSION, Hand, Labels, cached, checksum, field_of

HEADER = struct.Struct("<I2sHH")
HELD_OUT_EVERY = 5  # writers
PAPER = 255


class Sample(NamedTuple):
    """A character as it was scanned.

    Args:
        code: the bytes of its label.
        picture: grey levels, 255 for paper.
    """

    code: bytes
    picture: UInt8[np.ndarray, "height width"]

    @property
    def character(self) -> str:
        """The label; "" if the bytes are no character of GB 2312."""
        return self.code.decode("gb2312", errors="ignore").rstrip("\0")


class GntError(Exception):
    """A damaged file.

    Args:
        path: the file.
        offset: where the damaged sample starts, in bytes.
        problem: what is wrong with it.
        samples: those before it.
    """

    def __init__(self, path: Path, offset: int, problem: str, samples: list[Sample]) -> None:
        """Keep what was found."""
        super().__init__(f"{path}: the sample at byte {offset} {problem}; {len(samples)} samples before it are whole")
        self.path, self.offset, self.problem, self.samples = path, offset, problem, samples


def read_gnt(path: Path) -> list[Sample]:
    """Return the samples of a file.

    Raises:
        GntError: it is damaged. The error has the samples before the damage.
    """
    content = path.read_bytes()
    if not content:
        raise GntError(path, 0, "is missing: the file is empty", [])
    samples: list[Sample] = []
    offset = 0
    while offset < len(content):
        problem = sample_problem(content, offset)
        if problem:
            raise GntError(path, offset, problem, samples)
        size, code, width, height = HEADER.unpack_from(content, offset)
        pixels = np.frombuffer(content, np.uint8, width * height, offset + HEADER.size)
        samples.append(Sample(code, pixels.reshape(height, width)))
        offset += size
    return samples


def sample_problem(content: bytes, offset: int) -> str | None:
    """Return what is wrong with the sample at an offset, None if nothing is."""
    left = len(content) - offset
    if left < HEADER.size:
        return f"is cut off: {left} bytes are left, and {HEADER.size} come before the pixels"
    size, _, width, height = HEADER.unpack_from(content, offset)
    if not width or not height or size != HEADER.size + width * height:
        return f"is damaged: it claims {size} bytes for {width} x {height} pixels, which take {10 + width * height}"
    if left < size:
        return f"is cut off: {left} of its {size} bytes are left"
    return None


class Handwriting(NamedTuple):
    """The writers of a folder.

    Args:
        hands: a hand for each file that has characters to use.
        skipped: how many samples were left out, by the label; "" for labels that are no character of GB 2312.
        blank: how many samples had no ink.
        damaged: the errors of files of which the part before the damage is used.
    """

    hands: list[Hand]
    skipped: Counter[str]
    blank: int
    damaged: list[GntError]

    def summary(self) -> str:
        """Return what was read and what was left out, in a sentence."""
        read = sum(len(hand.labels) for hand in self.hands)
        held_out = sum(hand.held_out for hand in self.hands)
        left_out = f"{self.skipped.total()} of other characters, {self.blank} blank"
        return f"{len(self.hands)} writers, {held_out} held out, {read} samples; left out: {left_out}"


def read_folder(
    folder: Path,
    characters: int,
    cache: Path,
    *,
    keep_damaged: bool = False,
    track: Callable[[list[Path]], Iterable[Path]] = iter,
) -> Handwriting:
    """Return the writers of all .gnt files in a folder and below, of whom every fifth is held out.

    Args:
        folder: of the files.
        characters: how many of `level_one()` to use; samples of others are counted and left out.
        cache: the folder that keeps fields.
        keep_damaged: whether to use what comes before the damage in a damaged file.
        track: is given the files and yields them, to show how far it is.

    Raises:
        FileNotFoundError: there is no .gnt file.
        ExceptionGroup: files are damaged, and are not to be used; it has all their `GntError`s.
    """
    paths = sorted(folder.rglob("*.gnt"))
    if not paths:
        raise FileNotFoundError(f"there are no .gnt files in {folder}")
    result = Handwriting([], Counter(), 0, [])
    for number, path in enumerate(track(paths)):
        try:
            samples = read_gnt(path)
        except GntError as error:
            result.damaged.append(error)
            samples = error.samples
        held_out = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        hand, skipped, blank = writer_hand(path, samples, characters, cache, held_out)
        result.skipped.update(skipped)
        result = result._replace(blank=result.blank + blank)
        if hand is not None:
            result.hands.append(hand)
    if result.damaged and not keep_damaged:
        raise ExceptionGroup(f"{len(result.damaged)} of {len(paths)} files are damaged", result.damaged)
    return result


def writer_hand(
    path: Path, samples: list[Sample], characters: int, cache: Path, held_out: bool
) -> tuple[Hand | None, Counter[str], int]:
    """Return a writer's hand, None if no sample can be used; the labels of others, counted; the number of blanks."""
    place = {character: number for number, character in enumerate(level_one()[:characters])}
    skipped = Counter(sample.character for sample in samples if sample.character not in place)
    known = [sample for sample in samples if sample.character in place]
    used = [sample for sample in known if sample.picture.min() < PAPER]
    if not used:
        return None, skipped, len(known)
    labels: Labels = np.array([place[sample.character] for sample in used], np.int32)
    content = sha256(b"".join(sample.code + sample.picture.tobytes() for sample in used)).hexdigest()
    key = checksum(content, characters, VERSION)
    fields = cached(cache / f"{path.stem}-{key}.npy", lambda: np.stack([field_of(ink_of(each)) for each in used]))
    return Hand(path.stem, "handwriting", held_out, key, labels, fields), skipped, len(known) - len(used)


def ink_of(sample: Sample) -> UInt8[np.ndarray, "height width"]:
    """Return a scanned character, 255 where there is ink: where it is darker than halfway to its darkest point."""
    darkness = PAPER - sample.picture.astype(np.int32)
    return np.where(2 * darkness > darkness.max(), 255, 0).astype(np.uint8)
