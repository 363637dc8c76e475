"""The commands that README.md and the docs tell a reader to type: listed, or run in a fresh clone.

    python -m tools.commands
    python -m tools.commands --run --only 'README|cost'

README.md: blocks of `sh` and `console`, and commands within the text. docs: every `pip install`. `--run` runs those of
README.md in their order in one clone and one environment, as its reader does, and each line of the docs in a clone and
an environment of its own. It prints exit code and seconds, and exits with 1 if a command fails.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# An hour or a device; CONTRIBUTING.md says which takes how long.
LONG = r"make (test|bench|docs|fonts|wheel)|-m benchmarks"
INSTALL = re.compile(r"pip install (?![.,:;])[^`\n]+")
_SHELL = re.compile(
    r"^```(?P<kind>sh|bash|console)\n(?P<block>.*?)^```|`(?P<within>(?:make [a-z]|pip |python -m |lsce-\w+ )[^`]*)`",
    re.MULTILINE | re.DOTALL,
)


class Command(NamedTuple):
    """What a page tells its reader to type."""

    page: str
    text: str


def in_order(page: str) -> list[str]:
    r"""Return the commands of a page, without comments, each on one line. Those of a console follow a dollar sign.

    Example:
        >>> in_order("```sh\npip install lsce  # or\nlsce-parity compare a \\\n    b\n```\nThen `make demo`.\n")
        ['pip install lsce', 'lsce-parity compare a b', 'make demo']
        >>> in_order("```console\n$ lsce-parity --help\n...\n```")
        ['lsce-parity --help']
    """
    found = []
    for match in _SHELL.finditer(page):
        lines = re.sub(r"\s*\\\n\s*", " ", match["block"] or "").splitlines() or [
            " ".join((match["within"] or "").split())
        ]
        if match["kind"] == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        found += [command for line in lines if (command := without_comment(line))]
    return found


def without_comment(line: str) -> str:
    """Return a line of shell without its comment.

    Example:
        >>> without_comment("pip install -e '.[cost]'      # on Linux")
        "pip install -e '.[cost]'"
    """
    return re.sub(r"(^|\s)#.*", "", line).strip()


def install_lines(text: str) -> list[str]:
    """Return what follows `pip install` wherever a text has it, with `pip install` and without a comment."""
    return [without_comment(found) for found in INSTALL.findall(text)]


def commands() -> list[Command]:
    """Return the commands of README.md and the install lines of the docs, each once a page."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = [Command("README.md", text) for text in in_order(readme)]
    for page in sorted(ROOT.glob("docs/*.md")):
        text = page.read_text(encoding="utf-8")
        found += [Command(f"docs/{page.name}", line) for line in install_lines(text)]
    return [*dict.fromkeys(found)]


def requirements(command: str) -> tuple[str | None, list[str]]:
    """Return the extras of lsce and the other requirements that a `pip install` names.

    Example:
        >>> requirements("pip install -e '.[metrics]' lightning")
        ('metrics', ['lightning'])
        >>> requirements("pip install --pre torchax")
        (None, ['torchax'])
    """
    words = [word for word in shlex.split(command)[2:] if not word.startswith("-")]
    ours = [found[1] for word in words if (found := re.fullmatch(r"(?:\.|lsce)\[(.*)\]", word))]
    return ",".join(ours) or None, [word for word in words if not re.match(r"(\.|lsce)($|\[)", word)]


# --- Running them ---------------------------------------------------------------------------------------------------


def places(chosen: list[Command]) -> Iterator[list[Command]]:
    """Yield the commands that share a clone and an environment: all of README.md, and each line of the docs."""
    readme = [command for command in chosen if command.page == "README.md"]
    if readme:
        yield readme
    yield from ([command] for command in chosen if command.page != "README.md")


def run_in_a_clone(chosen: list[Command]) -> list[int]:
    """Run commands in a new clone, with a new environment first on the PATH; print and return their exit codes."""
    codes = []
    with tempfile.TemporaryDirectory() as folder:
        clone, environment = Path(folder, "lsce"), Path(folder, "environment")
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        venv.create(environment, symlinks=True, with_pip=True)
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        variables["PATH"] = f"{environment / 'bin'}:{variables['PATH']}"
        for page, text in chosen:
            started = time.monotonic()
            outcome = subprocess.run(
                text, shell=True, cwd=clone, env=variables, check=False, text=True, capture_output=True
            )
            codes.append(outcome.returncode)
            print(f"{page:20} exit {outcome.returncode} {time.monotonic() - started:5.0f} s  {text}", flush=True)
            if not is_right(text, outcome.returncode):
                print((outcome.stdout + outcome.stderr)[-2000:], flush=True)
    return codes


def is_right(command: str, code: int) -> bool:
    """Return whether a command may end with an exit code: 1 of `lsce-parity compare` says that two losses differ."""
    return code == 0 or (code == 1 and "lsce-parity compare" in command)


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(description="List or run the commands of README.md, and the docs' install lines.")
    parser.add_argument("--run", action="store_true", help="run them in fresh clones; up to 7 GB at a time")
    parser.add_argument("--only", default="", metavar="REGEX", help="of page and command")
    parser.add_argument("--skip", default=LONG, metavar="REGEX", help="not run; by default what takes an hour")
    arguments = parser.parse_args()
    chosen = [command for command in commands() if re.search(arguments.only, " ".join(command))]
    if not arguments.run:
        for page, text in chosen:
            print(f"{page:20} {text}")
        return 0
    skipped = [command for command in chosen if re.search(arguments.skip, command.text)] if arguments.skip else []
    for page, text in skipped:
        print(f"{page:20} not run         {text}")
    failed = 0
    for together in places([command for command in chosen if command not in skipped]):
        codes = run_in_a_clone(together)
        failed += sum(not is_right(command.text, code) for command, code in zip(together, codes, strict=True))
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
