"""The gallery: the table of docs/examples.md as cards, with the pictures that the examples draw.

python -m tools.site.gallery               draw all pictures again, into docs/images/gallery; some minutes
python -m tools.site.gallery digits mixup  draw these
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tools.repository import source_link
from tools.site.sources import ROOT, Published, SiteError, grid

TITLES = {
    "characters": "Chinese characters",
    "study": "Smoothing study",
    "lm": "Language model",
    "digits_parity": "The demo",
    "mixup": "MixUp and CutMix",
}
PICTURES = ROOT / "docs" / "images" / "gallery"


class Example(NamedTuple):
    """A row of the table.

    Args:
        task: what the names of its scripts have in common.
        scripts: the names of its scripts.
        about: what it shows.
    """

    task: str
    scripts: tuple[str, ...]
    about: str

    @property
    def picture(self) -> Path | None:
        """The picture that it has drawn, if there is one."""
        paths = (PICTURES / f"{self.task}.png", PICTURES.parent / f"{self.task}.png")
        return next((path for path in paths if path.is_file()), None)


def examples(table: str) -> list[Example]:
    """Return the rows of a table whose first column names scripts and whose second column says what they show.

    Raises:
        SiteError: a script is not there.
    """
    found = []
    for names, about in re.findall(r"^\| (`[^|]*`) \| ([^|]*) \|$", table, re.MULTILINE):
        scripts = tuple(re.findall(r"`([\w.]+)`", names))
        for script in scripts:
            if not (ROOT / path_of(script)).is_file():
                raise SiteError(f"docs/examples.md names {script}, but there is no {path_of(script)}")
        if scripts:
            task = re.sub(r"^(jax|torch)_|\..*", "", scripts[0])
            found.append(Example(task, scripts, about.strip()))
    return found


def path_of(script: str) -> str:
    """Return the file of a script, which may be in a folder of its own."""
    return f"examples/{script.replace('.', '/')}.py"


def cards(table: str, published: Published) -> str:
    """Return a card for each row of the table, with its picture and links to its scripts."""
    return grid((_card(example, published) for example in examples(table)), columns=2)


def _card(example: Example, published: Published) -> str:
    links = []
    for script in example.scripts:
        path = path_of(script)
        target = source_link(published.url, path, published.ref) if published.url else f"/source/{path}.md"
        links.append(f"[`{script}`]({target})")
    title = TITLES.get(example.task, example.task.replace("_", " ").capitalize())
    picture = example.picture
    lines = [f":::{{grid-item-card}} {title}"]
    if picture is not None:
        name = picture.relative_to(ROOT / "docs").as_posix()
        lines += [f":img-top: /{name}", f":img-alt: What the example {example.task} draws."]
    about = example.about[0].upper() + example.about[1:]
    return "\n".join([*lines, "", f"{about}.", "", " ".join(links), ":::", ""])


# --- Drawing --------------------------------------------------------------------------------------------------------


def draw(example: Example) -> None:
    """Run the first script of an example with its defaults, and keep the picture that it draws.

    Raises:
        SiteError: it draws no picture, or several.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", f"examples.{example.scripts[0]}", "--output", folder]
        subprocess.run(command, cwd=ROOT, check=True)
        drawn = sorted(Path(folder).glob("*.png"))
        if len(drawn) != 1:
            raise SiteError(f"{example.scripts[0]} has drawn {[path.name for path in drawn]}; expected one picture")
        PICTURES.mkdir(exist_ok=True)
        (PICTURES / f"{example.task}.png").write_bytes(drawn[0].read_bytes())


def main() -> None:
    """Draw the pictures of the pairs, or of those that are named."""
    table = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    # What has a picture outside of the gallery takes long, and has a command of its own.
    pairs = [example for example in examples(table) if not (PICTURES.parent / f"{example.task}.png").is_file()]
    parser = argparse.ArgumentParser(description="Draw the pictures of the gallery.")
    parser.add_argument("task", nargs="*", help=f"one of {', '.join(pair.task for pair in pairs)}; all by default")
    asked = parser.parse_args().task
    for pair in pairs:
        if pair.task in asked or not asked:
            draw(pair)


if __name__ == "__main__":
    main()
