"""Fetches open Chinese fonts as packages, each with all 3755 characters of level 1 of GB 2312. `make fonts` runs it.

    python -m examples.characters.fonts

Web fonts come from npm, wherever there is npm; the others from Debian or Ubuntu, by `apt-get download`, which needs no
root. A package is unpacked, not installed. The fonts and a manifest go to out/fonts, which git ignores; what is there
already is not fetched again. The manifest says of each face which package, version, licence and checksums it has, and
whether it is held out for testing.

`train_jax` and `train_torch` train on the faces that are there. On a machine without apt-get these are the web fonts.
"""

import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from functools import cache
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, NamedTuple

import numpy as np
import typer
from fontTools.ttLib import TTFont, TTLibError
from jaxtyping import UInt8
from PIL import ImageFont
from rich.console import Console
from rich.table import Table

from examples.common import made_folder, new_app, write_whole

FOLDER, MANIFEST = Path("out/fonts"), "manifest.json"
Ink = UInt8[np.ndarray, "height width"]


@cache
def level_one() -> str:
    """Return the 3755 characters of level 1 of GB 2312, in its order: rows 16 to 55, the last of which is not full.

    Example:
        >>> len(level_one()), level_one()[:3], level_one()[-1]
        (3755, '啊阿埃', '座')
    """
    codes = (bytes([0xA0 + row, 0xA0 + cell]) for row in range(16, 56) for cell in range(1, 95))
    return "".join(code.decode("gb2312", errors="ignore") for code in codes)


# --- The faces ------------------------------------------------------------------------------------------------------


class Face(NamedTuple):
    """A face to fetch.

    Args:
        name: of its folder.
        family: the family's own name.
        style: what kind of hand it is.
        source: "npm" or "debian".
        package: of that registry.
        files: pattern of the font's files in the package; web fonts are divided into many, by ranges of characters.
        licence: its name.
        terms: pattern of the files in the package that hold the licence's text.
        held_out: whether it is for testing only.
        number: of the face in a collection.
        weight: of a variable font; None for others.
    """

    name: str
    family: str
    style: str
    source: str
    package: str
    files: str
    licence: str
    terms: str
    held_out: bool = False
    number: int = 0
    weight: int | None = None


def web_font(name: str, family: str, style: str, *, held_out: bool = False) -> Face:
    """Return a face of the Fontsource project. woff, unlike woff2, is read without a library for Brotli."""
    files = f"package/files/{name}-*-400-normal.woff"
    return Face(name, family, style, "npm", f"@fontsource/{name}", files, "OFL-1.1", "package/LICENSE", held_out)


def variable_web_font(name: str, family: str, style: str) -> Face:
    """Return a face of the Fontsource project that has a single file for all weights, at 400."""
    files, package = f"package/files/{name}-*-wght-normal.woff2", f"@fontsource-variable/{name}"
    return Face(name, family, style, "npm", package, files, "OFL-1.1", "package/LICENSE", weight=400)


def fandol(kind: str, style: str, *, held_out: bool = False) -> Face:
    """Return a face of Fandol, which TeX Live has."""
    files = f"*/opentype/public/fandol/Fandol{kind}-Regular.otf"
    package, licence = "texlive-lang-chinese", "GPL-3.0 with font exception"
    name = f"fandol-{kind.lower()}"
    return Face(name, f"Fandol {kind}", style, "debian", package, files, licence, "*/fonts/fandol/README", held_out)


def debian(package: str, family: str, style: str, licence: str, *, held_out: bool = False) -> Face:
    """Return the first face of a package of Debian with a single font."""
    terms = f"*/doc/{package}/copyright"
    name = package.removeprefix("fonts-")
    return Face(name, family, style, "debian", package, "*/fonts/truetype/*.tt[fc]", licence, terms, held_out)


# Arphic's UMing and UKai are left out beside its older SungtiL and KaitiM: they have the same Chinese glyphs.
FACES = (
    fandol("Song", "song", held_out=True),
    fandol("Hei", "hei"),
    fandol("Kai", "kai"),
    fandol("Fang", "fangsong"),
    debian("fonts-arphic-gbsn00lp", "AR PL SungtiL GB", "ming", "Arphic Public License"),
    debian("fonts-arphic-gkai00mp", "AR PL KaitiM GB", "kai", "Arphic Public License", held_out=True),
    debian("fonts-wqy-microhei", "WenQuanYi Micro Hei", "hei", "Apache-2.0 or GPL-3.0 with font exception"),
    debian("fonts-wqy-zenhei", "WenQuanYi Zen Hei", "hei", "GPL-2.0 with font exception", held_out=True),
    variable_web_font("noto-serif-sc", "Noto Serif SC", "song"),
    variable_web_font("noto-sans-sc", "Noto Sans SC", "hei"),
    web_font("ma-shan-zheng", "Ma Shan Zheng", "brush"),
    web_font("zhi-mang-xing", "Zhi Mang Xing", "running hand"),
    web_font("liu-jian-mao-cao", "Liu Jian Mao Cao", "cursive hand"),
    web_font("long-cang", "Long Cang", "pen", held_out=True),
    web_font("zcool-xiaowei", "ZCOOL XiaoWei", "display, with serifs"),
    web_font("zcool-qingke-huangyou", "ZCOOL QingKe HuangYou", "display, square"),
    web_font("zcool-kuaile", "ZCOOL KuaiLe", "display, round"),
)


# --- Reading --------------------------------------------------------------------------------------------------------


class FontsError(Exception):
    """What is wrong with the fonts, and what to do about it."""


class Typeface:
    """A face that is on this machine, in one file or in many that divide its characters."""

    def __init__(self, name: str, files: Iterable[Path], number: int = 0, weight: int | None = None) -> None:
        """Find out which file has which character.

        Raises:
            FontsError: a file is no font.
        """
        self.name, self.number, self.weight = name, number, weight
        self.file_of: dict[int, Path] = {}
        for file in files:
            try:
                with file.open("rb") as stream, TTFont(stream, lazy=True, fontNumber=number) as font:
                    codes = font.getBestCmap() or {}
            except (TTLibError, OSError, AssertionError, ImportError) as problem:
                raise FontsError(f"{file} cannot be read as a font: {problem}") from None
            for code in codes:
                self.file_of.setdefault(code, file)

    def lacks(self, characters: str) -> str:
        """Return the characters that no file has, or that are drawn without ink."""
        return "".join(each for each in characters if ord(each) not in self.file_of or not self.ink(each, 16).any())

    def ink(self, character: str, size: int) -> Ink:
        """Return a character as drawn, 255 where there is ink, cut to the box that it fills.

        Args:
            character: one of those that the face has.
            size: of the em square, in pixels.
        """
        mask = _font(self.file_of[ord(character)], size, self.number, self.weight).getmask(character, mode="L")
        return np.array(mask, np.uint8).reshape(mask.size[::-1])


@cache
def _font(file: Path, size: int, number: int, weight: int | None) -> ImageFont.FreeTypeFont:
    font = ImageFont.truetype(file, size, index=number)
    if weight is not None:
        font.set_variation_by_axes([weight])
    return font


class FetchedFace(NamedTuple):
    """A face of the manifest.

    Args:
        name, family, style, source, package, licence, held_out, number, weight: see `Face`.
        version: of the package.
        archive: SHA-256 of the package's file.
        files: SHA-256 of each file of the font, by its name in the folder of the face.
    """

    name: str
    family: str
    style: str
    source: str
    package: str
    version: str
    archive: str
    licence: str
    held_out: bool
    number: int
    weight: int | None
    files: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """A checksum of the font and of how it is read."""
        return sha256(json.dumps([self.files, self.number, self.weight], sort_keys=True).encode()).hexdigest()

    def typeface(self, folder: Path) -> Typeface:
        """Return the face to draw with, from the folder of all fonts."""
        return Typeface(self.name, [folder / self.name / file for file in self.files], self.number, self.weight)


def read_manifest(folder: Path) -> list[FetchedFace]:
    """Return the faces of a folder that `make fonts` has written, and check that the files are those of the manifest.

    Raises:
        FontsError: there is no manifest, it is damaged, or a file is missing or has changed.
    """
    path = folder / MANIFEST
    try:
        faces = [FetchedFace(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        raise FontsError(f"{path} is not there. Run `make fonts`, or name the folder that has it.") from None
    except (OSError, ValueError, TypeError) as problem:
        raise FontsError(f"{path} is damaged ({problem}). Remove it and run `make fonts`.") from None
    for face in faces:
        problem = changed_file(folder / face.name, face.files)
        if problem:
            raise FontsError(f"{folder / face.name / problem} is missing or not as fetched. Run `make fonts`.")
    return faces


def changed_file(folder: Path, files: dict[str, str]) -> str | None:
    """Return the first file that is missing or has another checksum, None if all are as they were."""
    for name, checksum in files.items():
        path = folder / name
        if not path.is_file() or sha256(path.read_bytes()).hexdigest() != checksum:
            return name
    return None


def write_manifest(folder: Path, faces: Iterable[FetchedFace]) -> None:
    """Write the manifest."""
    content = json.dumps([face._asdict() for face in faces], indent=1, ensure_ascii=False)
    write_whole(folder / MANIFEST, content.encode())


# --- Fetching -------------------------------------------------------------------------------------------------------


class Archive(NamedTuple):
    """A package's file.

    Args:
        version: of the package.
        checksum: its SHA-256.
        path: the file.
    """

    version: str
    checksum: str
    path: Path


CLIENTS = {
    "npm": (("npm",), "npm, which comes with Node.js"),
    "debian": (("apt-get", "dpkg-deb"), "apt-get and dpkg-deb, which Debian and Ubuntu have"),
}


def fetch_archive(source: str, package: str, folder: Path) -> Archive:
    """Download a package into an empty folder.

    Raises:
        FontsError: there is no client for that registry, or it could not fetch the package.
    """
    clients, needed = CLIENTS[source]
    if not all(map(shutil.which, clients)):
        raise FontsError(f"needs {needed}")
    if source == "npm":
        run_client(["npm", "pack", "--ignore-scripts", package], folder)
    else:
        # If root calls it, apt-get would download as another user, who may not write to root's folder.
        run_client(["apt-get", "download", "-o", "APT::Sandbox::User=root", package], folder)
    (path,) = folder.iterdir()
    if source == "npm":
        with tarfile.open(path) as archive:
            version = json.loads(archive.extractfile("package/package.json").read())["version"]  # type: ignore[union-attr]
    else:
        version = run_client(["dpkg-deb", "--field", str(path), "Version"], folder).strip()
    return Archive(version, sha256(path.read_bytes()).hexdigest(), path)


def run_client(command: list[str], folder: Path) -> str:
    """Run a command in a folder, and return what it prints.

    Raises:
        FontsError: it failed; the message has its last line.
    """
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        said = next((line for line in lines if line.startswith(("E: ", "npm error"))), lines[-1])
        hint = "; try `apt-get update` first" if command[0] == "apt-get" else ""
        raise FontsError(f"`{' '.join(command[:2])}` failed: {said.strip()}{hint}")
    return done.stdout


def matching(path: Path, *patterns: str) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the files in a package whose path matches a pattern.

    Debian's packages are divided into archives, of which dpkg-deb gives the one with files, whatever compresses it.
    """
    if path.suffix != ".deb":
        with tarfile.open(path) as archive:
            yield from _matching(archive, patterns)
        return
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as archive,
    ):
        yield from _matching(archive, patterns)
        _drain(process.stdout)


def _matching(archive: tarfile.TarFile, patterns: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        if member.isfile() and any(fnmatch(member.name, pattern) for pattern in patterns):
            yield PurePosixPath(member.name).name, archive.extractfile(member).read()  # type: ignore[union-attr]


def _drain(stream: IO[bytes] | None) -> None:
    while stream is not None and stream.read(2**20):
        pass


def unpack(face: Face, archive: Archive, folder: Path) -> FetchedFace:
    """Write the files of a face and its licence to a folder of its own, and check that every character is there.

    Raises:
        FontsError: the package has no such files, or a character is missing.
    """
    partial, target = folder / f"{face.name}.partial", folder / face.name
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, content in matching(archive.path, face.files, face.terms):
        is_font = fnmatch(f"/{name}", f"*/{PurePosixPath(face.files).name}")
        (partial / (name if is_font else "licence.txt")).write_bytes(content)
    fonts = sorted(path for path in partial.iterdir() if path.name != "licence.txt")
    if not fonts:
        raise FontsError(f"version {archive.version} has no file {face.files}")
    lacking = Typeface(face.name, fonts, face.number, face.weight).lacks(level_one())
    if lacking:
        raise FontsError(f"version {archive.version} lacks {len(lacking)} of the characters: {lacking[:10]}")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    _font.cache_clear()
    files = {path.name: sha256((target / path.name).read_bytes()).hexdigest() for path in fonts}
    own = {name: value for name, value in face._asdict().items() if name not in ("files", "terms")}
    return FetchedFace(**own, version=archive.version, archive=archive.checksum, files=files)


def present_faces(folder: Path) -> dict[str, FetchedFace]:
    """Return the faces that are there and as they were fetched, by name."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        faces = [FetchedFace(**entry) for entry in entries]
    except (OSError, ValueError, TypeError):
        return {}
    return {face.name: face for face in faces if changed_file(folder / face.name, face.files) is None}


def fetch(folder: Path, faces: Iterable[Face], console: Console) -> dict[str, str]:
    """Fetch the faces that are not there, a package at a time, and keep the manifest up to date.

    Returns:
        What went wrong, by the name of the face.
    """
    faces = list(faces)
    present, problems = present_faces(folder), {}
    for source, package in dict.fromkeys((face.source, face.package) for face in faces):
        wanted = [face for face in faces if face.package == package and face.name not in present]
        if not wanted:
            continue
        with console.status(f"fetching {package} ({source})"), tempfile.TemporaryDirectory() as temporary:
            try:
                archive = fetch_archive(source, package, Path(temporary))
            except FontsError as problem:
                problems |= {face.name: str(problem) for face in wanted}
                continue
            for face in wanted:
                try:
                    present[face.name] = unpack(face, archive, folder)
                except FontsError as problem:
                    problems[face.name] = str(problem)
                shutil.rmtree(folder / f"{face.name}.partial", ignore_errors=True)
        write_manifest(folder, [present[face.name] for face in faces if face.name in present])
    return problems


# --- The command line -----------------------------------------------------------------------------------------------


def make_table(present: dict[str, FetchedFace]) -> Table:
    """Return a row for each face: what it is, and where it is from. The manifest has packages and licences."""
    table = Table("face", "style", "for", "from", "version")
    for face in FACES:
        fetched = present.get(face.name)
        version = fetched.version if fetched else "not fetched"
        table.add_row(face.family, face.style, "testing" if face.held_out else "training", face.source, version)
    return table


app = new_app()


@app.command()
def main(output: Annotated[Path, typer.Option(callback=made_folder, help="Folder for the fonts.")] = FOLDER) -> None:
    """Fetch open Chinese fonts from npm and from Debian or Ubuntu, and write a manifest.

    Nothing is installed. Fonts that are there already are kept. Exit code 0: there are fonts to train on and fonts to
    test on. 1: there are not.
    """
    console = Console()
    problems = fetch(output, FACES, console)
    present = present_faces(output)
    console.print(make_table(present))
    for name, problem in problems.items():
        console.print(f"not fetched: {name}: {problem}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"{len(present)} of {len(FACES)} faces are in {output}", soft_wrap=True, highlight=False)
    if {face.held_out for face in present.values()} != {True, False}:
        console.print("The examples need at least one face to train on and one to test on.")
        raise typer.Exit(code=1)


if __name__ == "__main__":
    app()
