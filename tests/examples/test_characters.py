"""The Chinese characters: fonts and their manifest, pictures, .gnt files, and the two trainings, with fonts made here.

`make fonts` is not needed: the fonts have a few characters, each of a few bars.
"""

import ast
import inspect
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.image import imread
from rich.console import Console

from examples.characters import common, images, train_jax, train_torch
from examples.characters import fonts as fetching
from examples.characters import report as reporting
from examples.characters.fonts import FACES, Face, FetchedFace, FontsError, Typeface, level_one, read_manifest
from examples.characters.gnt import GntError, read_folder, read_gnt
from examples.characters.images import Samples, distort, field_of, fit, font_hand, undistorted
from examples.study import tasks

pytestmark = pytest.mark.usefixtures("optax_promotion", "one_thread")

CHARACTERS = level_one()[:12]
PAIR = [train_jax, train_torch]


def name(example):
    return example.__name__.rpartition(".")[2]


each_example = pytest.mark.parametrize("example", PAIR, ids=name)


# --- Fonts that are made here ---------------------------------------------------------------------------------------


def bars(character, face):
    """Return the corners of bars that make a character, moved a little by the face."""
    random, own = np.random.default_rng(ord(character)), np.random.default_rng([ord(character), face])
    shapes = []
    for _ in range(4):
        left, bottom = random.integers(50, 500, 2) + own.integers(-20, 20, 2)
        wide, high = random.permutation([random.integers(200, 400), 60 + 20 * face])
        shapes.append([(left, bottom), (left, bottom + high), (left + wide, bottom + high), (left + wide, bottom)])
    return shapes


def font_bytes(characters, face, blank=""):
    """Return a font with some characters, of which some have no ink."""
    names = [".notdef", *(f"uni{ord(character):04X}" for character in characters)]
    glyphs = {}
    for glyph, character in zip(names, " " + characters, strict=True):
        pen = TTGlyphPen(None)
        for corners in bars(character, face) if character not in " " + blank else []:
            pen.moveTo(corners[0])
            for corner in corners[1:]:
                pen.lineTo(corner)
            pen.closePath()
        glyphs[glyph] = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): f"uni{ord(c):04X}" for c in characters})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": f"Face {face}", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    file = io.BytesIO()
    builder.font.recalcTimestamp = False
    builder.save(file)
    return file.getvalue()


def add_face(folder, face, held_out, files):
    """Write the files of a face, and return its entry in the manifest."""
    own = folder / f"face-{face}"
    own.mkdir(parents=True)
    for file, content in files.items():
        (own / file).write_bytes(content)
    checksums = {file: fetching.sha256(content).hexdigest() for file, content in files.items()}
    place = ("test", "npm", "package", "1.0", "", "none", held_out, 0, None)
    return FetchedFace(f"face-{face}", f"Face {face}", *place, checksums)


@pytest.fixture(scope="module")
def fonts(tmp_path_factory):
    """A folder as `make fonts` writes it: two faces to train on, one of them in two files, and one held out."""
    folder = tmp_path_factory.mktemp("fonts")
    halves = {"1.ttf": font_bytes(CHARACTERS[:5], 1), "2.ttf": font_bytes(CHARACTERS[5:], 1)}
    faces = [
        add_face(folder, 0, False, {"all.ttf": font_bytes(CHARACTERS, 0)}),
        add_face(folder, 1, False, halves),
        add_face(folder, 2, True, {"all.ttf": font_bytes(CHARACTERS, 2)}),
    ]
    fetching.write_manifest(folder, faces)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def hands(fonts, cache):
    return [font_hand(face, fonts, len(CHARACTERS), cache) for face in read_manifest(fonts)]


# --- The characters and the faces -----------------------------------------------------------------------------------


def test_level_one_is_the_3755_characters():
    rows = {character.encode("gb2312")[0] - 0xA0 for character in level_one()}
    assert len(level_one()) == len(set(level_one())) == 3755
    assert rows == set(range(16, 56))
    assert level_one()[0] == "啊"
    assert level_one()[-1] == "座"


def test_faces():
    assert len({face.name for face in FACES}) == len(FACES) >= 8
    for source in fetching.CLIENTS:
        # On a machine without Debian's packages, or without npm, there is still what the examples need.
        assert {face.held_out for face in FACES if face.source == source} == {True, False}
    held_out = {face.style for face in FACES if face.held_out}
    assert len(held_out) == len([face for face in FACES if face.held_out])


def test_a_face_in_several_files(fonts):
    face = read_manifest(fonts)[1].typeface(fonts)
    assert face.lacks(CHARACTERS) == ""
    assert face.lacks(level_one()[:14]) == level_one()[12:14]
    assert face.file_of[ord(CHARACTERS[0])].name == "1.ttf"
    assert face.file_of[ord(CHARACTERS[-1])].name == "2.ttf"
    assert face.ink(CHARACTERS[0], 40).max() == 255


def test_a_character_without_ink_is_missing(tmp_path):
    (tmp_path / "font.ttf").write_bytes(font_bytes(CHARACTERS, 0, blank=CHARACTERS[3]))
    assert Typeface("blank", [tmp_path / "font.ttf"]).lacks(CHARACTERS) == CHARACTERS[3]


def test_what_is_no_font(tmp_path):
    (tmp_path / "font.ttf").write_bytes(b"no font")
    with pytest.raises(FontsError, match=r"font\.ttf cannot be read as a font: "):
        Typeface("none", [tmp_path / "font.ttf"])


# --- The manifest ---------------------------------------------------------------------------------------------------


def test_manifest_survives(fonts):
    faces = read_manifest(fonts)
    assert [face.held_out for face in faces] == [False, False, True]
    assert len({face.fingerprint for face in faces}) == 3


def remove_manifest(folder):
    (folder / "manifest.json").unlink()


def tear_manifest(folder):
    content = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(content[: len(content) // 2])


def forget_a_field(folder):
    entries = json.loads((folder / "manifest.json").read_text())
    del entries[0]["files"]
    (folder / "manifest.json").write_text(json.dumps(entries))


def remove_font(folder):
    (folder / "face-1" / "2.ttf").unlink()


def change_font(folder):
    with (folder / "face-1" / "2.ttf").open("ab") as file:
        file.write(b" ")


WRONG_FONTS = {
    remove_manifest: r"manifest\.json is not there\. Run `make fonts`",
    tear_manifest: r"manifest\.json is damaged .*Remove it and run `make fonts`",
    forget_a_field: r"manifest\.json is damaged .*files.*Remove it and run `make fonts`",
    remove_font: r"face-1/2\.ttf is missing or not as fetched\. Run `make fonts`",
    change_font: r"face-1/2\.ttf is missing or not as fetched\. Run `make fonts`",
}


@pytest.mark.parametrize("damage", [*WRONG_FONTS], ids=lambda damage: damage.__name__)
def test_wrong_fonts(damage, fonts, tmp_path, run_example):
    folder = shutil.copytree(fonts, tmp_path / "fonts")
    damage(folder)
    with pytest.raises(FontsError, match=WRONG_FONTS[damage]):
        read_manifest(folder)
    result = run_example(train_torch, *small(folder, tmp_path / "cache", tmp_path / "out"))
    assert result.exit_code == 2
    assert "'--fonts': " in result.stderr
    assert "make fonts" in result.stderr


# --- Fetching -------------------------------------------------------------------------------------------------------


def npm_face(face, held_out=False):
    files = f"package/files/{face}-*.ttf"
    return Face(f"web-{face}", f"Web {face}", "test", "npm", f"web-{face}", files, "none", "package/LICENSE", held_out)


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry in place of npm's, with packages of two faces. Returns the list of what was asked for."""
    monkeypatch.setattr(fetching, "level_one", lambda: CHARACTERS)
    asked = []

    def fetch_archive(source, package, folder):
        asked.append(package)
        number = int(package[-1])
        with tarfile.open(folder / "package.tgz", "w:gz") as archive:
            for file, content in {
                "package.json": b'{"version": "1.2"}',
                "LICENSE": b"none",
                f"files/{number}-1.ttf": font_bytes(CHARACTERS[:7], number),
                f"files/{number}-2.ttf": font_bytes(CHARACTERS[7:], number),
                "files/other.ttf": b"other",
            }.items():
                entry = tarfile.TarInfo(f"package/{file}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        return fetching.Archive("1.2", "checksum", folder / "package.tgz")

    monkeypatch.setattr(fetching, "fetch_archive", fetch_archive)
    monkeypatch.setattr(fetching, "FACES", (npm_face(1), npm_face(2, held_out=True)))
    return asked


def test_fetched_once(registry, run_example, tmp_path):
    first = run_example(fetching, "--output", tmp_path / "fonts")
    assert first.exit_code == 0, first.output
    assert "2 of 2 faces are in " in first.output
    assert registry == ["web-1", "web-2"]
    faces = read_manifest(tmp_path / "fonts")
    assert [[*face.files] for face in faces] == [["1-1.ttf", "1-2.ttf"], ["2-1.ttf", "2-2.ttf"]]
    assert [face.held_out for face in faces] == [False, True]
    assert {(face.version, face.archive, face.licence) for face in faces} == {("1.2", "checksum", "none")}
    assert (tmp_path / "fonts" / "web-1" / "licence.txt").read_bytes() == b"none"

    (tmp_path / "fonts" / "web-2" / "2-1.ttf").write_bytes(b"torn")
    assert run_example(fetching, "--output", tmp_path / "fonts").exit_code == 0
    assert registry == ["web-1", "web-2", "web-2"]
    assert len(read_manifest(tmp_path / "fonts")) == 2


def test_an_interrupted_fetch_goes_on(registry, run_example, tmp_path, monkeypatch):
    fetch_archive = fetching.fetch_archive

    def interrupted(source, package, folder):
        if package == "web-2":
            raise KeyboardInterrupt
        return fetch_archive(source, package, folder)

    with monkeypatch.context() as patch:
        patch.setattr(fetching, "fetch_archive", interrupted)
        assert run_example(fetching, "--output", tmp_path).exit_code != 0
    assert registry == ["web-1"]
    assert run_example(fetching, "--output", tmp_path).exit_code == 0
    assert registry == ["web-1", "web-2"]


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb, which Debian and Ubuntu have")
def test_files_of_a_debian_package(tmp_path):
    root = tmp_path / "root"
    for file, content in {
        "DEBIAN/control": "Package: face\nVersion: 1-2\nArchitecture: all\nMaintainer: none\nDescription: none\n",
        "usr/share/fonts/truetype/face/face.ttf": "font",
        "usr/share/doc/face/copyright": "none",
    }.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(content)
    subprocess.run(["dpkg-deb", "--build", root, tmp_path / "face.deb"], check=True, stdout=subprocess.DEVNULL)
    found = fetching.matching(tmp_path / "face.deb", "*/truetype/*.tt[fc]", "*/doc/face/copyright")
    assert sorted(found) == [("copyright", b"none"), ("face.ttf", b"font")]


def test_a_font_that_lacks_characters_is_refused(registry, run_example, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "level_one", lambda: level_one()[:14])
    result = run_example(fetching, "--output", tmp_path / "fonts")
    assert result.exit_code == 1
    assert f"not fetched: web-1: version 1.2 lacks 2 of the characters: {level_one()[12:14]}" in result.output
    assert "at least one face to train on and one to test on" in result.output
    assert not [path for path in (tmp_path / "fonts").iterdir() if path.is_dir()]


@pytest.mark.usefixtures("registry")
def test_a_package_without_the_files(run_example, tmp_path, monkeypatch):
    face = npm_face(1)._replace(files="package/files/1-*.woff")
    monkeypatch.setattr(fetching, "FACES", (face, npm_face(2)))
    result = run_example(fetching, "--output", tmp_path / "fonts")
    assert "not fetched: web-1: version 1.2 has no file package/files/1-*.woff" in result.output
    assert "1 of 2 faces are in " in result.output
    assert result.exit_code == 1  # none to test on


@pytest.mark.parametrize(("source", "needed"), [("npm", "needs npm"), ("debian", "needs apt-get and dpkg-deb")])
def test_no_client(source, needed, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching.shutil, "which", lambda client: None)
    with pytest.raises(FontsError, match=needed):
        fetching.fetch_archive(source, "package", tmp_path)


def test_a_client_that_fails(tmp_path):
    code = "import sys; print('npm error 404', file=sys.stderr); print('last', file=sys.stderr); sys.exit(1)"
    with pytest.raises(FontsError, match=r"failed: npm error 404"):
        fetching.run_client([sys.executable, "-c", code], tmp_path)


# --- Pictures -------------------------------------------------------------------------------------------------------


def test_fit_keeps_proportions():
    ink = np.zeros((50, 90), np.uint8)
    ink[10:20, 5:85] = 255
    rows, columns = (np.flatnonzero(fit(ink).max(axis=axis) > 127) for axis in (1, 0))
    assert len(columns) == 80
    assert len(rows) == 10
    assert rows[0] + rows[-1] == columns[0] + columns[-1] == 95  # in the middle


def test_field_is_the_distance_to_the_edge():
    # A square of 80 of 96 pixels, which is 40 of 48 points: the edge lies 4 points from the sides.
    field = field_of(np.full((7, 7), 255, np.uint8)) / 16
    np.testing.assert_array_equal(field[24, :8], np.arange(8) - 3.5)
    assert field[24, 24] == field.max() == 127 / 16  # int8


def test_no_ink():
    with pytest.raises(ValueError, match="there is no ink"):
        field_of(np.zeros((5, 5), np.uint8))


def test_undistorted_is_the_character(hands):
    for hand in hands:
        drawn = undistorted(hand.fields) > 127
        np.testing.assert_array_equal(drawn, hand.fields >= 0)
        assert np.all((drawn.mean((1, 2)) > 0.05) & (drawn.mean((1, 2)) < 0.6))


def test_distortions(hands):
    fields = np.repeat(hands[0].fields[:1], 40, 0)
    pictures = distort(fields, [1, 2])
    np.testing.assert_array_equal(pictures, distort(fields, [1, 2]))
    assert np.any(pictures != distort(fields, [1, 3]), axis=(1, 2)).all()
    ink = pictures.mean((1, 2)) / 255
    assert ink.std() > 0.02  # strokes of different width
    assert np.all((ink > 0.02) & (ink < 0.7))


def between(low, values, high):
    return np.all((low < values) & (values < high))


def test_grids_are_shifted_turned_scaled_and_bent():
    grid = images.bent_grid(400, np.random.default_rng(0)).astype(np.float64).reshape(800, -1)
    plain = np.stack([np.ones((32, 32)), *np.meshgrid(*2 * [np.linspace(-1, 1, 32)], indexing="ij")]).reshape(3, -1)
    fit, *_ = np.linalg.lstsq(plain.T, grid.T)
    centre, down, across = fit.reshape(3, 400, 2).transpose(0, 2, 1)
    assert between(1, centre.std(axis=1), 2)
    assert np.all(np.abs(centre.mean(axis=1) - 23.5) < 0.2)
    along, aslant = np.array([down[0], across[1]]), np.array([down[1], across[0]])
    assert between(1, along.std(axis=1), 4)  # scaled
    assert np.all(np.abs(along.mean(axis=1) - 24) < 1.5)
    assert between(2, aslant.std(axis=1), 4)  # turned and sheared
    bent = np.abs(grid - (plain.T @ fit).T).max(axis=1)
    assert 0.3 < np.median(bent) < 2


def test_a_row_is_the_picture_of_its_hand(hands, cache):
    samples = Samples(hands, 5, cache)
    rows = np.array([35, 0, 13, 24, 11])
    pictures, labels = samples.batch(rows, 1)
    assert pictures.dtype == np.float32
    for row, picture, label in zip(rows, pictures, labels, strict=True):
        hand = samples.hands[row // 12]
        assert label == row % 12
        np.testing.assert_array_equal(picture, samples.pictures(hand, 1)[row % 12] / np.float32(255))
    np.testing.assert_array_equal(samples.hand_of(rows), rows // 12)
    assert np.any(samples.batch(rows, 2)[0] != pictures)
    assert np.any(Samples(hands, 6, cache).batch(rows, 1)[0] != pictures)
    # Whichever other hands there are.
    np.testing.assert_array_equal(Samples(hands[1:], 5, cache).batch(rows[2:3] - 12, 1)[0], pictures[2:3])


def test_pictures_are_kept(hands, cache, monkeypatch):
    samples = Samples(hands, 7, cache)
    first = samples.batch(np.arange(36), 0)[0]
    monkeypatch.setattr(images, "distort", None)
    np.testing.assert_array_equal(Samples(hands, 7, cache).batch(np.arange(36), 0)[0], first)


# --- .gnt files -----------------------------------------------------------------------------------------------------


def gnt_sample(character, picture):
    code = character.encode("gb2312").ljust(2, b"\0")
    height, width = picture.shape
    return struct.pack("<I2sHH", 10 + picture.size, code, width, height) + picture.tobytes()


def scanned(character, writer):
    """Return a scanned character: bars in a grey, on white, of a size of its own."""
    random = np.random.default_rng([ord(character), writer])
    picture = np.full((random.integers(30, 60), random.integers(30, 60)), 255, np.uint8)
    for _ in range(3):
        top, left = random.integers(2, 20, 2)
        picture[top : top + random.integers(4, 30), left : left + random.integers(4, 30)] = 40
    return picture


@pytest.fixture
def gnt(tmp_path):
    """A folder with files of six writers, and a sample of each of the characters in each."""
    folder = tmp_path / "gnt"
    folder.mkdir()
    for writer in range(6):
        samples = [gnt_sample(character, scanned(character, writer)) for character in CHARACTERS]
        (folder / f"{writer:03}.gnt").write_bytes(b"".join(samples))
    return folder


def test_gnt_is_read_as_written(gnt):
    samples = read_gnt(gnt / "003.gnt")
    assert "".join(sample.character for sample in samples) == CHARACTERS
    for sample in samples:
        np.testing.assert_array_equal(sample.picture, scanned(sample.character, 3))


def test_gnt_that_is_cut_anywhere(tmp_path):
    picture = np.arange(6, dtype=np.uint8).reshape(2, 3)
    content = b"".join(gnt_sample(character, picture) for character in CHARACTERS[:3])
    path = tmp_path / "cut.gnt"
    for size in range(1, len(content) + 1):
        path.write_bytes(content[:size])
        whole, left = divmod(size, 16)
        if left == 0:
            assert len(read_gnt(path)) == whole
            continue
        with pytest.raises(GntError) as caught:
            read_gnt(path)
        assert str(caught.value).startswith(f"{path}: the sample at byte {16 * whole} is cut off: {left} ")
        assert str(caught.value).endswith(f"; {whole} samples before it are whole")
        assert [sample.character for sample in caught.value.samples] == [*CHARACTERS[:whole]]


@pytest.mark.parametrize("header", [(17, 3, 2), (16, 2, 2), (0, 3, 2), (10, 0, 2), (2**32 - 1, 65535, 65535)], ids=str)
def test_gnt_with_sizes_that_contradict_each_other(header, tmp_path):
    size, width, height = header
    good = gnt_sample(CHARACTERS[0], np.zeros((2, 3), np.uint8))
    path = tmp_path / "bad.gnt"
    path.write_bytes(good + struct.pack("<I2sHH", size, b"\xb0\xa1", width, height) + bytes(6) + good)
    with pytest.raises(GntError, match=rf"byte 16 is damaged: it claims {size} bytes for {width} x {height} pixels"):
        read_gnt(path)


def test_writers(gnt, cache):
    found = read_folder(gnt, len(CHARACTERS), cache)
    assert [hand.held_out for hand in found.hands] == [False] * 4 + [True, False]
    assert [hand.name for hand in found.hands] == [f"{writer:03}" for writer in range(6)]
    assert all([*hand.labels] == [*range(12)] for hand in found.hands)
    assert (found.skipped.total(), found.blank, found.damaged) == (0, 0, [])


def test_other_characters_are_counted(tmp_path, cache):
    ink, paper = np.zeros((4, 4), np.uint8), np.full((4, 4), 255, np.uint8)
    shown = [(CHARACTERS[2], ink), ("丂", ink), ("A", ink), (CHARACTERS[3], paper), (level_one()[50], ink), ("亍", ink)]
    content = (
        b"".join(gnt_sample(c, p) for c, p in shown if c != "丂") + struct.pack("<I2sHH", 11, b"\xff\xff", 1, 1) + b"\0"
    )
    (tmp_path / "a.gnt").write_bytes(content)
    found = read_folder(tmp_path, len(CHARACTERS), cache)
    assert [*found.hands[0].labels] == [2]
    assert found.skipped == {"A": 1, level_one()[50]: 1, "亍": 1, "": 1}
    assert found.summary() == "1 writers, 0 held out, 1 samples; left out: 4 of other characters, 1 blank"


def test_a_writer_with_nothing_to_use(tmp_path, cache):
    (tmp_path / "a.gnt").write_bytes(gnt_sample("A", np.zeros((4, 4), np.uint8)))
    found = read_folder(tmp_path, len(CHARACTERS), cache)
    assert (found.hands, found.skipped) == ([], {"A": 1})


def test_an_empty_file_is_damaged(tmp_path, cache):
    path = tmp_path / "a.gnt"
    path.write_bytes(b"")
    with pytest.raises(ExceptionGroup) as caught:
        read_folder(tmp_path, len(CHARACTERS), cache)
    assert str(caught.value.exceptions[0]).startswith(f"{path}: the sample at byte 0 is missing: the file is empty; 0 ")
    found = read_folder(tmp_path, len(CHARACTERS), cache, keep_damaged=True)
    assert (found.hands, len(found.damaged)) == ([], 1)


# --- The command lines ----------------------------------------------------------------------------------------------


def small(fonts, cache, output, *more):
    """Return options for a run of seconds."""
    options = {"characters": 12, "steps": 10, "batch-size": 8, "checkpoint-every": 4}
    folders = {"fonts": fonts, "cache": cache, "output": output}
    return [text for option, value in {**options, **folders}.items() for text in (f"--{option}", str(value))] + [*more]


TWO = ("--loss", "uniform", "--loss", "linear")


def train(example, run_example, fonts, cache, output, *more):
    result = run_example(example, *small(fonts, cache, output, *more))
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.fixture(scope="module")
def runs(fonts, cache, run_example, tmp_path_factory):
    """A folder with runs of both examples, and what they printed."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, {
        name(example): train(example, run_example, fonts, cache, folder / name(example), *TWO) for example in PAIR
    }


def losses(output, loss="uniform"):
    return (output / loss / "losses.jsonl").read_text()


@pytest.mark.slow
@each_example
def test_run(example, runs):
    folder, printed = runs
    text = printed[name(example)]
    picture = folder / name(example) / "characters.png"
    assert text.endswith(f"wrote {picture}\n")
    words = " ".join(text.split())
    assert "12 characters: 24 of 2 hands to train on, 12 of 1 unseen fonts to test on; 4 distorted pictures" in words
    assert "uniform, dense and linear: losses differ by at most" in words
    assert max(map(len, text.splitlines()[:-1])) <= 80
    assert "nan" not in text
    assert 0.7 < imread(picture)[..., :3].mean() < 0.999
    result = json.loads((folder / name(example) / "linear" / "result.json").read_text())
    assert result["metrics"]["unseen fonts"].keys() == common.METRICS.keys()
    by_hand = result["by_hand"]["unseen fonts"]
    assert {hand: np.float32(accuracy) for hand, accuracy in by_hand.items()} == {
        "Face 2": np.float32(result["metrics"]["unseen fonts"]["accuracy"])
    }
    shown = [line for line in text.splitlines() if line.startswith("│ linear")]
    assert f"{result['metrics']['unseen fonts']['nll']:.4f}" in shown[0]


@pytest.mark.slow
@each_example
def test_what_is_done_is_not_done_again(example, runs, fonts, cache, run_example, monkeypatch):
    folder, printed = runs
    monkeypatch.setattr(example, "train_step", None)
    monkeypatch.setattr(example, "evaluation_step", None)
    again = train(example, run_example, fonts, cache, folder / name(example), *TWO)
    assert (
        again[again.index("Characters of") :] == printed[name(example)][printed[name(example)].index("Characters of") :]
    )


@pytest.mark.slow
@each_example
def test_other_options_are_refused(example, runs, fonts, cache, run_example):
    folder = runs[0] / name(example)
    before = losses(folder)
    for other in (["--smoothing", "0.2"], ["--steps", "11"], ["--seed", "1"]):
        result = run_example(example, *small(fonts, cache, folder, *TWO), *other)
        assert result.exit_code == 2
        assert "holds another run" in result.stderr
        assert "add --fresh" in result.stderr
    assert losses(folder) == before


BAD = {
    "loss": (["--loss", "unifrom"], "'--loss': unknown loss 'unifrom'. Known: none, uniform, non_target, clamp,"),
    "smoothing": (["--smoothing", "1.5"], "'--smoothing': smoothing must be in [0, 1], got 1.5."),
    "batch": (["--batch-size", "25"], "'--batch-size': a batch has 25 pictures, and there are 24 to train on."),
    "characters": (["--characters", "3756"], "'--characters': "),
    "gnt": (["--gnt", "."], "'--gnt': there are no .gnt files in ."),
}


@each_example
@pytest.mark.parametrize("bad", [*BAD])
def test_bad_options(example, bad, fonts, cache, run_example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[bad]
    result = run_example(example, *small(fonts, cache, tmp_path / "out"), *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not list(tmp_path.rglob("losses.jsonl"))


def test_characters_that_a_font_lacks(fonts, cache, run_example, tmp_path):
    result = run_example(train_torch, *small(fonts, cache, tmp_path / "out"), "--characters", "13")
    assert result.exit_code == 2
    assert f"Face 0 lacks the character {level_one()[12]}" in " ".join(result.stderr.split())


def test_no_face_that_is_held_out(fonts, cache, run_example, tmp_path):
    folder = shutil.copytree(fonts, tmp_path / "fonts")
    fetching.write_manifest(folder, [face._replace(held_out=False) for face in read_manifest(fonts)])
    result = run_example(train_torch, *small(folder, cache, tmp_path / "out"))
    assert result.exit_code == 2
    assert "needs a face to train on and one that is held out" in result.stderr


def test_handwriting(gnt, fonts, cache, run_example, tmp_path):
    printed = train(train_torch, run_example, fonts, cache, tmp_path / "out", "--loss", "clamp", "--gnt", str(gnt))
    assert "6 writers, 1 held out, 72 samples; left out: 0 of other characters, 0 blank" in printed
    assert "84 of 7 hands to train on, 12 of 1 unseen fonts, 12 of 1 unseen writers" in " ".join(printed.split())
    assert "Characters of unseen writers" in printed
    result = json.loads((tmp_path / "out" / "clamp" / "result.json").read_text())
    assert [*result["by_hand"]["unseen writers"]] == ["004"]


def test_damaged_handwriting(gnt, fonts, cache, run_example, tmp_path):
    path = gnt / "001.gnt"
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    last = len(content) - 10 - scanned(CHARACTERS[-1], 1).size
    options = small(fonts, cache, tmp_path / "out", "--loss", "none", "--gnt", str(gnt))
    refused = run_example(train_torch, *options)
    assert refused.exit_code == 2
    said = " ".join(refused.stderr.split())
    assert f"1 of 6 files are damaged: {path}: the sample at byte {last} is cut off: " in said
    assert "11 samples before it are whole" in said
    assert "--keep-damaged" in said
    kept = run_example(train_torch, *options, "--keep-damaged")
    assert kept.exit_code == 0, kept.output
    assert "6 writers, 1 held out, 71 samples" in kept.output
    assert f"damaged: {path}: the sample at byte {last} is cut off: " in kept.output


# --- The two are one example ----------------------------------------------------------------------------------------


def definitions(module):
    tree = ast.parse(inspect.getsource(module))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def options(module):
    parameters = inspect.signature(module.main).parameters.values()
    return {each.name: (each.annotation, each.default if each.name != "output" else None) for each in parameters}


def test_pair_mirrors():
    # torch's optimizer is given the rate of each step, Optax's has them all; torch's batch norm is not Flax's.
    in_jax = [each for each in definitions(train_jax) if each != "make_transformation"]
    assert in_jax == [each for each in definitions(train_torch) if each != "BatchNorm"]
    assert options(train_jax) == options(train_torch)


@pytest.mark.parametrize("shape", [(4, 2, 2, 3), (4, 3)], ids=["maps", "features"])
def test_batch_norms_are_one(shape):
    """Also what is kept for testing: the variance of n values is their mean square in both, not n / (n - 1) of it."""
    in_jax = nnx.BatchNorm(
        3,
        momentum=1 - common.NORM_SHARE,
        epsilon=common.NORM_EPSILON,
        use_fast_variance=False,
        rngs=nnx.Rngs(0),
    )
    in_torch = train_torch.BatchNorm(3)
    random = np.random.default_rng(0)
    for training in (True, True, True, False):
        for norm in (in_jax, in_torch):
            (norm.train if training else norm.eval)()
        values = random.normal(1, 2, shape).astype(np.float32)
        ours = np.asarray(in_jax(jnp.asarray(values)))
        theirs = np.moveaxis(in_torch(torch.from_numpy(np.moveaxis(values, -1, 1))).detach().numpy(), 1, -1)
        # Each is a sum of at most 16 terms, a product and a few roundings of numbers of size 1: far less than 64 units.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=64 * 2.0**-24 * np.abs(ours).max())
    np.testing.assert_allclose(in_jax.var[...], in_torch.running_var, rtol=64 * 2.0**-24)
    np.testing.assert_allclose(in_jax.mean[...], in_torch.running_mean, rtol=0, atol=64 * 2.0**-24)


def test_learning_rates_rise_and_fall():
    rates = common.learning_rates(64)
    assert rates.dtype == np.float32
    assert np.all(np.diff(rates[:4]) > 0)
    assert np.all(np.diff(rates[4:]) < 0)
    assert rates.max() <= common.PEAK_LEARNING_RATE
    assert len(common.learning_rates(1)) == 1


def report(run_example, folder, fonts, cache, output, *more):
    arguments = {"jax": folder / "train_jax", "torch": folder / "train_torch", "fonts": fonts, "cache": cache}
    arguments |= {"output": output, "replicas": 2}
    return run_example(
        reporting, *(text for option, value in arguments.items() for text in (f"--{option}", value)), *more
    )


@pytest.mark.slow
def test_report(runs, fonts, cache, run_example, tmp_path):
    documentation = tmp_path / "page.md"
    documentation.write_text("<!-- examples.characters.report: begin -->\n<!-- examples.characters.report: end -->\n")
    result = report(run_example, runs[0], fonts, cache, tmp_path, "--page", documentation)
    assert result.exit_code == 0, (result.output, result.exception)
    last = result.stdout.splitlines()[-1]
    assert last.startswith("AGREE: at most ")
    assert last.endswith("in 4 pairs, first 10 steps")
    page = (tmp_path / "characters.html").read_text(encoding="utf-8")
    assert page.index("AGREE") < page.index("<h2>")
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == [
        "curves.png", "differences.png", "distortions.png", "errors_unseen_fonts.png", "hands.png",
        "reliability_unseen_fonts.png",
    ]  # fmt: skip
    assert page.count("data:image/png;base64,") == len(pictures)
    assert "<script" not in page
    for path in tmp_path.glob("*.png"):
        assert 0.4 < imread(path)[..., :3].mean() < 0.99, path

    written = documentation.read_text(encoding="utf-8")
    assert "`python -m examples.characters.report --page " in written
    assert f"`{last}`" in written
    both = [runs[0] / name(example) for example in PAIR]
    results = [json.loads((folder / "linear" / "result.json").read_text()) for folder in both]
    nll = " | ".join(f"{result['metrics']['unseen fonts']['nll']:.4f}" for result in results)
    assert f" | {nll} | " in written
    steps = [[json.loads(line)["loss"] for line in losses(folder, "linear").splitlines()] for folder in both]
    said = [np.load(folder / "linear" / "unseen_fonts_prediction.npy") for folder in both]
    apart, differ = np.abs(np.subtract(*steps)).max(), np.count_nonzero(np.not_equal(*said))
    assert f"| linear | {apart:.1e} | {differ} of 12 | " in written
    copied = {path.name for path in (tmp_path / "images").iterdir()}
    assert copied == {f"hanzi_{name}" for name in pictures if not name.startswith(("hands", "distortions"))}
    assert all(f"](images/{name})" in written for name in copied)


@pytest.mark.slow
def test_a_wrong_loss_disagrees(runs, fonts, cache, run_example, tmp_path, monkeypatch):
    shutil.copytree(runs[0] / "train_jax", tmp_path / "train_jax")
    right = train_torch.make_loss
    wrong = {"uniform": "non_target"}
    monkeypatch.setattr(train_torch, "make_loss", lambda loss, *others: right(wrong.get(loss, loss), *others))
    train(train_torch, run_example, fonts, cache, tmp_path / "train_torch", *TWO)
    result = report(run_example, tmp_path, fonts, cache, tmp_path / "page")
    assert result.exit_code == 1, (result.output, result.exception)
    assert result.stdout.splitlines()[-1].startswith("DISAGREE from step 0 (uniform, JAX and torch): difference ")
    assert 'class="verdict disagree"' in (tmp_path / "page" / "characters.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_report_refuses_what_does_not_belong_together(runs, fonts, cache, run_example, tmp_path):
    folder = shutil.copytree(runs[0], tmp_path / "runs")
    file = folder / "train_torch" / "linear" / "options.json"
    changed = json.loads(file.read_text()) | {"seed": 3}
    file.write_text(json.dumps(changed))
    result = report(run_example, folder, fonts, cache, tmp_path / "page")
    assert result.exit_code == 2
    assert "has other options than the other runs" in " ".join(result.stderr.split())
    (folder / "train_torch" / "uniform" / "result.json").unlink()
    assert "is not done. Give its command again." in " ".join(
        report(run_example, folder, fonts, cache, tmp_path / "page").stderr.split()
    )
    shutil.rmtree(folder / "train_jax")
    assert "no loss has runs in both" in " ".join(
        report(run_example, folder, fonts, cache, tmp_path / "page").stderr.split()
    )


# --- Going on after a stop ------------------------------------------------------------------------------------------


class StopError(Exception):
    """What stops a training at a step."""


def outcome(output, loss="uniform"):
    """Return the losses, and what the network says of each test picture."""
    arrays = {path.name: np.load(path).tolist() for path in sorted((output / loss).glob("*.npy"))}
    return losses(output, loss), (output / loss / "result.json").read_text(), arrays


@pytest.mark.slow
@each_example
@pytest.mark.parametrize("loss", ["uniform", "linear"])
def test_goes_on_as_if_nothing_had_happened(example, loss, runs, fonts, cache, run_example, tmp_path):
    def training_batch(data, options, step):
        if step == 7:
            raise StopError
        return common.training_batch(data, options, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "training_batch", training_batch)
        stopped = run_example(example, *small(fonts, cache, tmp_path, "--loss", loss))
    assert isinstance(stopped.exception, StopError)
    assert len(losses(tmp_path, loss).splitlines()) == 7  # three of them are past the checkpoint
    train(example, run_example, fonts, cache, tmp_path, "--loss", loss)
    assert outcome(tmp_path, loss) == outcome(runs[0] / name(example), loss)


@pytest.mark.slow
@each_example
def test_a_wrong_resumption_shows(example, runs, fonts, cache, run_example, tmp_path, monkeypatch):
    shutil.copytree(runs[0] / name(example) / "uniform", tmp_path / "uniform")
    (tmp_path / "uniform" / "result.json").unlink()
    restore = example.Checkpoints.restore

    def wrong(self, network, optimizer):
        return min(restore(self, network, optimizer), 8)  # the weights are those of step 10

    monkeypatch.setattr(example.Checkpoints, "restore", wrong)
    monkeypatch.setattr(example.Checkpoints, "save", lambda *_: None)
    train(example, run_example, fonts, cache, tmp_path, "--loss", "uniform")
    assert outcome(tmp_path) != outcome(runs[0] / name(example))


@pytest.mark.slow
@each_example
def test_kill_9(example, fonts, cache, run_example, tmp_path):
    """The process is killed while it trains the second of two losses, and goes on with the same command."""
    arguments = [*TWO, "--steps", "60"]
    output, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", example.__name__, *small(fonts, cache, output), *arguments]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    file = output / "linear" / "losses.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not file.exists() or file.read_bytes().count(b"\n") < 21:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert 20 < len(losses(output, "linear").splitlines()) < 60
    for folder in (output, whole):
        subprocess.run([*command, "--output", str(folder)], env=environment, stdout=subprocess.DEVNULL, check=True)
    for loss in ("uniform", "linear"):
        assert outcome(output, loss) == outcome(whole, loss)


@pytest.mark.slow
def test_all_losses_agree(fonts, cache, run_example, tmp_path):
    for example in PAIR:
        train(example, run_example, fonts, cache, tmp_path / name(example))
    result = report(run_example, tmp_path, fonts, cache, tmp_path / "page")
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.stdout.splitlines()[-1].endswith("in 8 pairs, first 10 steps")


@pytest.mark.slow
@pytest.mark.usefixtures("optax_promotion")
def test_characters_in_the_study_of_smoothing(fonts, cache, monkeypatch):
    """The task of the study: unseen fonts are halved, and batch norms use what they have seen."""
    monkeypatch.setattr(tasks, "CHARACTERS_BATCH_SIZE", 8)
    sources = common.Sources(fonts, None, False, cache)
    task = tasks.characters_task(sources, Console(quiet=True), len(CHARACTERS), steps=12)
    data = task.data(0)
    assert (len(data.train.labels), len(data.calibration.labels), len(data.test.labels)) == (24, 6, 6)
    assert {*data.calibration.labels, *data.test.labels} == {*range(12)}
    trained = tasks.look_at(tasks.train(task, data, 0, "uniform", 0.1), data)
    measures = tasks.measure(task, trained)
    assert all(np.isfinite(list(measures.values())))
    weight, bias = map(np.asarray, trained.layer)
    right = np.argmax(trained.test.inputs @ weight + bias, axis=-1) == data.test.labels
    assert measures["accuracy"] == pytest.approx(right.mean(), rel=1e-6)
    # A picture has the same features beside blank ones: batch norms use what they have seen in training.
    blank = data.test._replace(inputs=data.test.inputs * (np.arange(6) == 0)[:, None, None])
    network = tasks.train(task, data, 0, "uniform", 0.1)
    again = tasks.look_at(network, data._replace(test=blank))
    np.testing.assert_array_equal(again.test.inputs[0], trained.test.inputs[0])
    assert np.any(again.test.inputs[1] != trained.test.inputs[1])
