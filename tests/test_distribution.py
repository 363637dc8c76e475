"""`make wheel` checks all that pyproject.toml offers, and notices what is wrong. Nothing is installed here."""

import doctest
import json
import re
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager

from lsce_spec import extras
from tools import check_wheel, commands, install, notebooks, release, repository
from tools.check_wheel import CHECKS, EXTRAS, METADATA, PACKAGES, PYPROJECT, ROOT, CheckError

VERSION = PYPROJECT["project"]["version"]
WHEEL = f"lsce-{VERSION}-py3-none-any.whl"
DIST_INFO = f"lsce-{VERSION}.dist-info"


def test_every_extra_is_checked() -> None:
    """Fails if a new extra has no entry in tools.check_wheel.CHECKS."""
    assert CHECKS.keys() == {"", *EXTRAS}
    assert all(check.commands for check in CHECKS.values())


def test_the_halves_of_the_tests_are_all() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    rest = re.search(r"^REST := (.*)$", makefile, re.MULTILINE)
    assert rest
    assert {"parity_tests", *rest[1].split()} == {*PYPROJECT["tool"]["pytest"]["ini_options"]["testpaths"]}
    # Each test has the markers of one of these.
    selected = {
        *("not slow and not devices and not distributed", "slow and not devices", "distributed"),
        *("devices and not slow", "devices and slow"),
    }
    assert selected <= {*re.findall(r'(?:SELECTED \?= |SELECTED="|-m ")([^"\n]*)', makefile)}
    assert [*re.findall(r'-m "distributed" -k "(.*)" parity_tests', makefile)] == ["not ($(OF_TORCH))", "$(OF_TORCH)"]


def test_every_package_is_typed() -> None:
    assert {*PACKAGES} <= {*PYPROJECT["tool"]["mypy"]["packages"]}
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").read_bytes() == b"", package


# --- The check itself -----------------------------------------------------------------------------------------------


def write_wheel(folder: Path, *, without: str = "", extra: str = "", content: str = "") -> Path:
    """Write a wheel with the names that it must have, but for one, and the same content in each file."""
    names = {f"{DIST_INFO}/{name}" for name in METADATA} | check_wheel.sources()
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        for name in sorted(name for name in names | {extra} if name not in ("", without)):
            archive.writestr(name, content)
    return folder / WHEEL


def test_what_the_checkout_gives_must_be_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = write_wheel(tmp_path, content="same")
    monkeypatch.setattr(check_wheel, "run", lambda command: write_wheel(Path(command[-2]), content="same"))
    check_wheel.check_contents(wheel)
    monkeypatch.setattr(check_wheel, "run", lambda command: write_wheel(Path(command[-2]), content="other"))
    with pytest.raises(CheckError, match=r"from the checkout differ in .*'lsce_spec/options.py'"):
        check_wheel.check_contents(wheel)


@pytest.mark.parametrize(("change", "name"), [
    *(("without", name) for name in ("lsce_jax/fused.py", "lsce_torch/py.typed", f"{DIST_INFO}/licenses/LICENSE")),
    *(("extra", name) for name in ("tests/test_jax.py", "lsce_jax/draft.py", "parity_tests/suite/test_parity.py")),
])  # fmt: skip
def test_other_files_than_those_of_the_packages_are_named(change: str, name: str, tmp_path: Path) -> None:
    lacks, holds = ([name], []) if change == "without" else ([], [name])
    with pytest.raises(CheckError, match=re.escape(f"lacks {lacks} and should not hold {holds}")):
        check_wheel.check_contents(write_wheel(tmp_path, **{change: name}))


def test_a_command_that_fails_shows_what_it_printed() -> None:
    with pytest.raises(CheckError, match=r"(?s)exit code 3 of .*\nseen\n"):
        check_wheel.run([sys.executable, "-c", "print('seen'); raise SystemExit(3)"])


# --- What is installed, and how ------------------------------------------------------------------------------------

# Distributions that no requirement of pyproject.toml names, as their index spells them.
OTHERS = {
    *("cut-cross-entropy", "jax-cuda12-pjrt", "jax-cuda12-plugin", "liger-kernel", "tokamax", "torch-tpu", "torchax"),
}


def name_of(requirement: str) -> str:
    """Return the name of a requirement, as an index compares names."""
    found = re.match(r"[\w.-]*\w", requirement)
    return re.sub(r"[-_.]+", "-", found[0]).lower() if found else ""


def texts_with_commands() -> dict[str, str]:
    """Return the pages, docstrings, messages and notebooks that may tell a reader what to install, by path."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    tests = ("tests/", "parity_tests/meta/", "tools/commands.py", "lsce_spec/extras.py", "CHANGELOG.md")
    paths = [
        path for path in listed if path.endswith((".md", ".py", ".ipynb", ".jinja")) and not path.startswith(tests)
    ]
    return {path: (ROOT / path).read_text(encoding="utf-8") for path in paths}


def complaints(line: str) -> list[str]:
    """Return what is wrong with a line of `pip install`."""
    ours, others = commands.requirements(line)
    unknown = [name for name in (ours or "").split(",") if ours and name not in EXTRAS]
    wrong = [f"there is no extra {name}" for name in unknown]
    known = OTHERS | {name_of(requirement) for extra in EXTRAS.values() for requirement in extra}
    wrong += [f"{name_of(other)} is not known here" for other in others if name_of(other) not in known]
    expected = extras.install(ours, " ".join(others), clone=not extras.RELEASED) if ours else line
    return wrong + [f"write: {expected}"] * (line != expected)


def literal_lines(text: str, path: str) -> list[str]:
    """Return the lines of `pip install` in a text, without what only a run knows."""
    if path.endswith((".py", ".ipynb")):
        text = re.sub(r'\\?"(?!\.\[|lsce)', "\n", text)  # where a string ends
        text = re.sub(r"\{[^}]*\}", "1", text).replace("pip install 1", "")
    return [re.split(r"[,;.]? or pip|[.;,](?:\s|$)", line)[0] for line in commands.install_lines(text)]


def test_what_pages_and_messages_tell_to_install() -> None:
    lines = {(path, line) for path, text in texts_with_commands().items() for line in literal_lines(text, path)}
    assert {at: wrong for at in lines if (wrong := complaints(at[1]))} == {}
    said = "Nothing is on a package index yet" in (ROOT / "docs/install.md").read_text(encoding="utf-8")
    assert said == (not extras.RELEASED)


@pytest.mark.parametrize(
    ("origin", "clone"),
    [
        ({"dir_info": {"editable": True}, "url": "file:///src/lsce"}, True),
        ({"dir_info": {}, "url": "file:///src/lsce"}, True),
        ({"archive_info": {"hash": "sha256=0"}, "url": "file:///src/lsce/dist/lsce-0.1.0-py3-none-any.whl"}, False),
        ({"vcs_info": {"vcs": "git", "commit_id": "0"}, "url": "https://example.com/lsce.git"}, False),
        (None, False),  # an index
    ],
)
def test_the_form_that_works_for_the_reader(origin: object, clone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Installed:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return None if origin is None else json.dumps(origin)

    monkeypatch.setattr(extras, "distribution", lambda name: Installed())
    assert extras.install("cost") == ("pip install -e '.[cost]'" if clone else "pip install 'lsce[cost]'")


def test_a_clone_that_is_only_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "distribution", missing)
    assert extras.install("jax,torch", "torchax") == "pip install -e '.[jax,torch]' torchax"


# --- make demo, make install ----------------------------------------------------------------------------------------


def environment_with(folder: Path, script: str) -> Path:
    """Return a virtual environment whose Python is a script of the shell."""
    (folder / "bin").mkdir()
    (folder / "bin/python").write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    (folder / "bin/python").chmod(0o755)
    return folder


@pytest.mark.parametrize("code", [0, 1])
def test_an_installation_shows_how_far_it_is(code: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = (
        'echo "  Downloading torch-2.15.0-cp311-cp311-manylinux_2_28_x86_64.whl (1.5 GB)"\n'
        f'echo "Installing collected packages: rich, torch"; echo "no space" >&2; exit {code}'
    )
    assert install.install(environment_with(tmp_path, said), "demo", ["--constraint", "oldest.txt"]) == code
    assert capfd.readouterr() == ("  downloading torch 2.15.0, 1500 MB\n  unpacking 2 packages\n", "no space\n")


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[str]] = []
    monkeypatch.setattr(subprocess, "call", lambda command: made.append(command) or 0)
    install.create(environment_with(tmp_path, "echo 3.13"))
    assert made == []
    install.create(tmp_path / "new")
    assert made == [[sys.executable, "-m", "venv", str(tmp_path / "new")]]
    (tmp_path / "bin/python").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")  # its Python is too old
    (tmp_path / "pyvenv.cfg").touch()
    install.create(tmp_path)
    assert made[1:] == [[sys.executable, "-m", "venv", "--clear", str(tmp_path)]]
    monkeypatch.setattr(sys, "version_info", (3, 9, 6))
    with pytest.raises(SystemExit, match=r"lsce needs Python 3\.11 or newer, .* make demo PYTHON=python3\.13"):
        install.create(tmp_path)
    assert f">={'.'.join(map(str, install.OLDEST))}" == PYPROJECT["project"]["requires-python"]


@pytest.mark.parametrize("module", [commands, install, notebooks, repository], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0


# --- Where it is published ------------------------------------------------------------------------------------------

URL = "https://example.com/owner/name"


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        (URL, URL),
        (f"{URL}.git", URL),
        ("https://user:secret@example.com/owner/name.git", URL),
        ("git@example.com:owner/name.git", URL),
        ("ssh://git@example.com:2222/owner/name.git", URL),
        ("http://localhost:3000/owner/name", "http://localhost:3000/owner/name"),
        ("/srv/git/name.git", None),
        ("file:///srv/git/name.git", None),
        ("../name", None),
        ("https://example.com", None),
        ("", None),
    ],
)
def test_address_of_a_remote(remote: str, address: str | None) -> None:
    assert repository.web_address(remote) == address


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True)


def test_where_the_address_is_from(tmp_path: Path) -> None:
    assert repository.repository_url(tmp_path, {}) is None
    git(tmp_path, "init")
    assert repository.repository_url(tmp_path, {}) is None
    git(tmp_path, "remote", "add", "origin", "git@example.com:owner/name.git")
    assert repository.repository_url(tmp_path, {}) == URL
    assert repository.repository_url(tmp_path, {"LSCE_REPOSITORY_URL": "https://example.com/other/one/"}) == (
        "https://example.com/other/one"
    )
    (tmp_path / "unpacked").mkdir()  # an sdist in the checkout of something else
    assert repository.repository_url(tmp_path / "unpacked", {}) is None
    with pytest.raises(ValueError, match=r"LSCE_REPOSITORY_URL is 'name'; expected an address such as https://"):
        repository.repository_url(tmp_path, {"LSCE_REPOSITORY_URL": "name"})


def metadata_of_build() -> ProjectMetadata:
    """Return the metadata that a build of the package would have now."""
    return ProjectMetadata(str(ROOT), PluginManager())


def test_metadata_with_a_known_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSCE_REPOSITORY_URL", URL)
    monkeypatch.setenv("LSCE_REPOSITORY_REF", "v1.2.3")
    monkeypatch.delenv("LSCE_SITE_URL", raising=False)
    core = metadata_of_build().core
    assert core.urls == {
        "Documentation": f"{URL}/tree/v1.2.3/docs",
        "Source": URL,
        "Issues": f"{URL}/issues",
        "Changelog": f"{URL}/blob/v1.2.3/CHANGELOG.md",
    }
    assert repository.relative_links(core.readme) == []
    assert f"({URL}/blob/v1.2.3/docs/options.md#statistics)" in core.readme
    assert f"({URL}/raw/v1.2.3/docs/images/digits_parity.png)" in core.readme
    assert core.readme_content_type == "text/markdown"
    monkeypatch.setenv("LSCE_SITE_URL", "https://pages.example.com/name")
    assert metadata_of_build().core.urls["Documentation"] == "https://pages.example.com/name"


def test_metadata_without_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("LSCE_REPOSITORY_URL", "LSCE_REPOSITORY_REF", "LSCE_SITE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_DIR", str(tmp_path))  # there is no git here
    core = metadata_of_build().core
    assert core.urls == {}
    assert core.readme == (ROOT / "README.md").read_text(encoding="utf-8")
    assert "built without project URLs" in capfd.readouterr().err


def test_no_file_has_the_address() -> None:
    assert "urls" not in PYPROJECT["project"]
    assert {*PYPROJECT["project"]["dynamic"]} == {"readme", "urls"}
    for name in ("tests.yml", "docs.yml"):
        workflow = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))
        assert workflow["env"]["LSCE_REPOSITORY_URL"] == "${{ github.server_url }}/${{ github.repository }}"
        assert workflow["env"]["LSCE_REPOSITORY_REF"] == "${{ github.ref_type == 'tag' && github.ref_name || 'HEAD' }}"


def write_metadata(folder: Path, text: str) -> Path:
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        archive.writestr(f"{DIST_INFO}/METADATA", f"Metadata-Version: 2.4\nName: lsce\nVersion: {VERSION}\n{text}")
    return folder / WHEEL


def test_metadata_of_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(check_wheel, "run", commands.append)
    monkeypatch.setenv("LSCE_REPOSITORY_URL", URL)
    right = f"Project-URL: Source, {URL}\n\n[a]({URL}/a.md)\n"
    wheel = write_metadata(tmp_path, right)
    assert check_wheel.check_metadata(tmp_path, wheel) == {"Source": URL}
    assert commands == [[sys.executable, "-m", "twine", "check", "--strict", str(wheel)]]
    for wrong in (right.replace("name\n", "other\n"), right.replace(f"({URL}/a.md)", "(a.md)"), "\ntext\n"):
        with pytest.raises(CheckError, match=f"the repository is {URL}, but the wheel has"):
            check_wheel.check_metadata(tmp_path, write_metadata(tmp_path, wrong))


# --- Releases -------------------------------------------------------------------------------------------------------

CHANGELOG = """# Changelog

## Unreleased

## 0.2.0 - 2026-02-01

### Fixed

- A mistake.

## 0.1.0 - 2026-01-31

### Added

- All.
- More.
"""


def test_the_changelog_has_the_form() -> None:
    entries = release.read_changelog((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert entries[0].lines
    assert all(release.numbers(entry.version) <= release.numbers(VERSION) for entry in entries if entry.version)


def test_reading_a_changelog() -> None:
    entries = release.read_changelog(CHANGELOG)
    assert [entry.version for entry in entries] == [None, "0.2.0", "0.1.0"]
    assert [entry.lines for entry in entries] == [0, 1, 2]
    assert str(entries[1].date) == "2026-02-01"
    for old, new, said in (
        ("## 0.2.0 - 2026-02-01", "## 0.2.0 - unreleased", "found '## 0.2.0 - unreleased'"),
        ("### Fixed", "### Mended", "'### Mended' is none of Added, Changed"),
        ("0.2.0", "0.0.9", "from the newest to the oldest"),
        ("0.2.0", "0.1.0", "each once"),
    ):
        with pytest.raises(ValueError, match=said):
            release.read_changelog(CHANGELOG.replace(old, new))


@pytest.mark.parametrize(
    ("tag", "stated", "said"),
    [
        ("v0.2.0", "0.2.0", []),
        (
            "v0.2.0",
            "0.3.0",
            ["the tag is v0.2.0, and pyproject.toml has the version 0.3.0", "'## 0.3.0 - DATE' is missing"],
        ),
        ("0.2.0", "0.2.0", ["the tag is 0.2.0"]),
        ("v0.1.0", "0.1.0", ["the newest release in CHANGELOG.md is 0.2.0"]),
    ],
)
def test_which_tags_may_be_published(tag: str, stated: str, said: list[str]) -> None:
    found = release.problems(tag, stated, CHANGELOG)
    assert len(found) == len(said)
    assert all(part in whole for part, whole in zip(said, found, strict=True))


def test_only_a_tag_that_fits_is_published() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))["jobs"]
    assert (jobs["tests"]["needs"], jobs["publish"]["needs"]) == ("tag", "tests")
    assert (release.main([]), release.main(["v0.0.0"])) == (2, 1)


def test_the_version_stands_in_one_place() -> None:
    for name in ("CITATION.cff", "SECURITY.md", "README.md", "lsce_spec/__init__.py", "lsce_jax/__init__.py"):
        assert VERSION not in (ROOT / name).read_text(encoding="utf-8"), name


def test_python_versions_are_those_that_are_tested() -> None:
    tests = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))["jobs"]["test"]
    claimed = re.findall(r"Programming Language :: Python :: (3\.\d+)", "\n".join(PYPROJECT["project"]["classifiers"]))
    assert {*claimed} <= {*tests["strategy"]["matrix"]["python"]}
    assert PYPROJECT["project"]["requires-python"] == f">={claimed[0]}"
