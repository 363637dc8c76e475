"""The API pages: one for each public name of `lsce_jax` and `lsce_torch`, one for each of the smaller modules.

Sphinx reads the docstrings from the objects; what it cannot read is here: signatures with types as the source states
them (options in a TypedDict, shapes of jaxtyping), backticks that become links, and which name of the other package
does the same.
"""

import ast
import functools
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

FRAMEWORKS = {"lsce_jax": "JAX", "lsce_torch": "PyTorch"}
OTHER = {"lsce_jax": "lsce_torch", "lsce_torch": "lsce_jax"}
# Modules whose names share a page. Each has a title for the sidebar.
MODULES = {
    "lsce_jax.metrics": "lsce_jax.metrics",
    "lsce_torch.metrics": "lsce_torch.metrics",
    "lsce_torch.trainers": "lsce_torch.trainers",
    "lsce_spec": "lsce_spec",
    "lsce_parity": "lsce_parity",
}
# Names of one package that the other has under another name, or on purpose not at all.
COUNTERPARTS = {"lsce_torch.cross_entropy": "lsce_jax.label_smoothed_cross_entropy"}
INTRODUCTION = """\
API
===

Every public name, with its arguments, results and errors, and for most an example that the tests run. ``lsce_jax`` and
``lsce_torch`` have the same names, arguments and defaults; :doc:`the Options page </options>` lists what differs on
purpose. What is not listed here is internal and may change in any release.

.. list-table::
   :widths: auto

"""


class Public(NamedTuple):
    """A public name.

    Args:
        module: that users import it from.
        name: in this module.
        value: the object.
        home: the public module whose page documents it. Not `module` for names that two packages share.
    """

    module: str
    name: str
    value: Any
    home: str

    @property
    def full_name(self) -> str:
        """Return the name under which the site documents the object."""
        return f"{self.home}.{self.name}"


# --- Which names there are ------------------------------------------------------------------------------------------


def public_names(module: str) -> list[Public]:
    """Return the public names of a module, in the order of its source: what it lists, imports or defines."""
    imported = importlib.import_module(module)
    names = {name: getattr(imported, name) for name in _names_of(imported)}
    return [
        Public(module, name, value, "lsce_spec" if _is_shared(module, name, value) else module)
        for name, value in names.items()
    ]


def all_public_names() -> list[Public]:
    """Return the public names of all packages."""
    return [public for module in (*FRAMEWORKS, *MODULES) for public in public_names(module)]


def _names_of(module: ModuleType) -> list[str]:
    tree = ast.parse(inspect.getsource(module))
    if module.__name__ in MODULES and "." in module.__name__:
        kinds = ast.FunctionDef | ast.ClassDef
        return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    imported = [alias.asname or alias.name for node in imports for alias in node.names]
    listed = getattr(module, "__all__", None)
    if listed is None:
        return imported
    return [name for name in imported if name in listed]


def _is_shared(module: str, name: str, value: Any) -> bool:
    return module in FRAMEWORKS and getattr(value, "__module__", "").startswith("lsce_spec")


def counterpart(public: Public, known: Mapping[str, Public]) -> str | None:
    """Return the full name of what does the same in the other framework's package, or None."""
    if found := COUNTERPARTS.get(public.full_name):
        return found
    package, _, rest = public.full_name.partition(".")
    mirrored = f"{OTHER[package]}.{rest}" if package in OTHER else None
    return mirrored if mirrored in known else None


# --- Pages ----------------------------------------------------------------------------------------------------------


def pages() -> dict[str, str]:
    """Return the API pages as reStructuredText, by path below the folder of the pages."""
    known = {public.full_name: public for public in all_public_names()}
    made = {"api/index.rst": _index()}
    for package in FRAMEWORKS:
        own = [public for public in public_names(package) if public.home == package]
        made[f"api/{package}.rst"] = _package_page(package, known)
        made |= {f"api/{package}/{public.name}.rst": _name_page(public, known) for public in own}
    for module, title in MODULES.items():
        made[f"api/{module}.rst"] = _module_page(module, title, known)
    return made


def _index() -> str:
    rows = [*FRAMEWORKS, *MODULES]
    lines = [f"   * - :doc:`{module}`\n     - {summary(importlib.import_module(module))}\n" for module in rows]
    lines.append("   * - :doc:`commands`\n     - What ``lsce-parity`` and ``lsce-cost`` answer to ``--help``.\n")
    return INTRODUCTION + "".join(lines) + "\n" + _toctree([f"/api/{page}" for page in (*rows, "commands")])


def _package_page(package: str, known: Mapping[str, Public]) -> str:
    module = importlib.import_module(package)
    names = public_names(package)
    own = [f"/api/{package}/{public.name}" for public in names if public.home == package]
    parts = [heading(package), rst(inspect.getdoc(module) or "", package, known), _table(names), _toctree(own)]
    return "\n\n".join(parts)


def _name_page(public: Public, known: Mapping[str, Public]) -> str:
    return "\n\n".join([heading(public.name), _within(public.home), _entry(public, known)]) + "\n"


def _module_page(module: str, title: str, known: Mapping[str, Public]) -> str:
    names = public_names(module)
    text = rst(inspect.getdoc(importlib.import_module(module)) or "", module, known)
    entries = (_entry(public, known) for public in names)
    return "\n\n".join([heading(title), text, _table(names), heading("Names", "-"), _within(module), *entries]) + "\n"


def _within(module: str) -> str:
    """Return what makes Sphinx look for names in a module first."""
    return f".. currentmodule:: {module}"


def _table(names: list[Public]) -> str:
    rows = [
        f"   * - :py:obj:`{public.name} <{public.full_name}>`\n     - {_summary_in(public)}\n"
        for public in sorted(names, key=lambda public: public.name.lower())
    ]
    return ".. list-table::\n   :widths: auto\n   :class: names\n\n" + "".join(rows)


def _summary_in(public: Public) -> str:
    return summary(public.value) if has_docstring(public.value) else _literal_comment(public)


def _toctree(names: list[str]) -> str:
    return ".. toctree::\n   :hidden:\n\n" + "".join(f"   {name}\n" for name in names)


def _entry(public: Public, known: Mapping[str, Public]) -> str:
    other = counterpart(public, known)
    lines = [_directive(public)]
    if other is not None:
        framework = FRAMEWORKS[other.partition(".")[0]]
        lines.append(f".. seealso::\n\n   In {framework}: :py:obj:`{other}`.")
    return "\n\n".join(lines)


def _directive(public: Public) -> str:
    """Return the directive that documents a name."""
    value = public.value
    if inspect.isclass(value) and has_docstring(value):
        kind = "exception" if issubclass(value, BaseException) else "class"
        # The fields of a named tuple are its arguments.
        has_members = not issubclass(value, BaseException | tuple)
        options = "\n   :members:\n   :special-members: __call__\n   :member-order: bysource" if has_members else ""
        return f".. auto{kind}:: {public.full_name}{options}"
    if callable(value) and has_docstring(value):
        return f".. autofunction:: {public.full_name}"
    # Constants have no docstrings: the comment above each says what it is.
    value_text = textwrap.shorten(" ".join(repr(value).replace("typing.", "").split()), 160, placeholder=" ...")
    return (
        f".. py:data:: {public.name}\n   :module: {public.home}\n\n   {_literal_comment(public)}\n\n   ``{value_text}``"
    )


def has_docstring(value: Any) -> bool:
    """Return whether an object has a docstring of its own, not that of its type."""
    return inspect.getdoc(value) not in (None, inspect.getdoc(type(value)))


def _literal_comment(public: Public) -> str:
    """Return the comment above the assignment of a constant.

    Raises:
        ValueError: there is none.
    """
    file, line = assignment(public)
    lines = file.read_text(encoding="utf-8").splitlines()
    comment: list[str] = []
    while lines[line - 2].startswith("# "):
        comment.insert(0, lines[line - 2].removeprefix("# "))
        line -= 1
    if not comment:
        raise ValueError(f"{public.full_name} needs a comment above its assignment: {file.name} says nothing about it")
    return rst(" ".join(comment), public.home, {})


def assignment(public: Public) -> tuple[Path, int]:
    """Return the file and line in which a constant gets its value."""
    found = _assignments(public.home.partition(".")[0]).get(public.name)
    if found is None:
        raise ValueError(f"{public.full_name} has neither a docstring nor an assignment")
    return found


@functools.cache
def _assignments(package: str) -> dict[str, tuple[Path, int]]:
    """Return file and line of each assignment at the top of a package's modules, by name."""
    found = {}
    for file in sorted(Path(inspect.getfile(importlib.import_module(package))).parent.glob("*.py"), reverse=True):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found |= {target.id: (file, node.lineno) for target in targets if isinstance(target, ast.Name)}
    return found


def path_of_source(file: Path) -> str:
    """Return the path in the repository of a file of one of the packages, wherever that is installed."""
    top = file.parent
    while (top.parent / "__init__.py").is_file():
        top = top.parent
    return file.relative_to(top.parent).as_posix()


def heading(text: str, line: str = "=") -> str:
    """Return a heading."""
    return f"{text}\n{line * len(text)}"


def summary(value: Any) -> str:
    """Return the first sentence of a docstring, as reStructuredText without links."""
    first = " ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split())
    return rst(re.split(r"(?<=[.?])\s", first)[0], "", {})


# --- Docstrings -----------------------------------------------------------------------------------------------------


_BACKTICKS = re.compile(r"(?<![:`\w])`([^`]+)`(?!`)")
_BAR = re.compile(r"(?<![`\w|])\|(?=\w)")
_TITLED_EXAMPLE = re.compile(r"^Example: (.*)$", re.MULTILINE)
_NAMES_ON_TWO_LINES = re.compile(r"^(    \w[\w, ]*,)\n        +(?=[\w, ]+: )", re.MULTILINE)


def rst(docstring: str, module: str, known: Mapping[str, Public]) -> str:
    """Return a docstring with backticks as Sphinx reads them: links to public names, and code.

    Args:
        docstring: without common indentation.
        module: in which names without a module are looked for first.
        known: the public names, by full name.
    """

    def link(found: re.Match[str]) -> str:
        text = found[1]
        for full_name in (f"{module}.{text}", text, f"lsce_spec.{text}"):
            if full_name in known:
                return f":py:obj:`{text} <{full_name}>`"
        return f"``{text}``"

    # A bar before a word would start a substitution.
    lines = (line if re.match(" *(>>>|\\.\\.\\.)", line) else _BAR.sub(r"\\|", line) for line in docstring.split("\n"))
    # `Example: title` is no section for Napoleon, which also wants the names of an item on one line.
    text = _TITLED_EXAMPLE.sub(r"Example:\n    \1\n", "\n".join(lines))
    return _BACKTICKS.sub(link, _NAMES_ON_TWO_LINES.sub(r"\1 ", text))


def process_docstring(known: Mapping[str, Public], full_name: str, lines: list[str]) -> None:
    """Replace the lines of a docstring, as Sphinx's event `autodoc-process-docstring` wants it."""
    module = max((m for m in (*FRAMEWORKS, *MODULES) if full_name.startswith(f"{m}.")), key=len)
    lines[:] = rst("\n".join(lines), module, known).splitlines()


# --- Signatures -----------------------------------------------------------------------------------------------------


def signature(value: Any) -> str | None:
    """Return the arguments of a function or class in parentheses, with types as its source states them.

    None stands for what has no signature of its own.
    """
    function = _constructor(value) if inspect.isclass(value) else value
    if function is None:
        return None
    types, returned = _types(value, function)
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in ("self", "_cls"):
            continue
        annotation = types.get(parameter.name)
        shown = parameter.replace(annotation=_Text(annotation) if annotation else parameter.empty)
        if parameter.default is not parameter.empty:
            shown = shown.replace(default=_Text(_default(parameter.default)))
        parameters.append(shown)
    returns = inspect.Signature.empty if inspect.isclass(value) or returned is None else _Text(returned)
    return str(inspect.Signature(parameters, return_annotation=returns, __validate_parameters__=False))


class _Text(str):
    """What inspect.Signature shows as it is, without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _default(value: Any) -> str:
    shown = getattr(value, "__name__", None) or repr(value)
    return "..." if shown == "<factory>" else shown  # of a dataclass


def _constructor(value: type) -> Any:
    """Return what takes the arguments of a class, or None if that is not the class's own."""
    if issubclass(value, BaseException) or _is_typed_dict(value):
        return None
    if issubclass(value, tuple):
        return value.__new__
    return value.__init__ if value.__init__ is not object.__init__ else None


def _is_typed_dict(value: type) -> bool:
    return hasattr(value, "__total__")


def _types(value: Any, function: Any) -> tuple[dict[str, str], str | None]:
    """Return the types of the arguments and of the result, as the source writes them."""
    if inspect.isclass(value) and not _is_written(function):  # of a dataclass or a named tuple
        return _fields(_definition(value)), None
    function = inspect.unwrap(function)
    definition = _definition(function)
    assert isinstance(definition, ast.FunctionDef)
    arguments = definition.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    types = {argument.arg: _written(argument.annotation) for argument in named if argument.annotation}
    rest = arguments.kwarg
    if rest is not None and rest.annotation is not None:
        types[rest.arg] = ast.unparse(rest.annotation)
        if found := re.fullmatch(r"Unpack\[(\w+)\]", types[rest.arg]):
            keywords = function.__globals__[found[1]]
            stated = _keyword_types(sys.modules[keywords.__module__]).get(found[1], {})
            types = {**stated, **types}
    return types, None if definition.returns is None else ast.unparse(definition.returns)


def _written(annotation: ast.expr) -> str:
    """Return an annotation as its author wrote it, without the quotes around the whole of it."""
    is_quoted = isinstance(annotation, ast.Constant) and isinstance(annotation.value, str)
    return annotation.value if is_quoted else ast.unparse(annotation)


def _is_written(function: Any) -> bool:
    return hasattr(function, "__code__") and not function.__code__.co_filename.startswith("<")


def _definition(value: Any) -> ast.FunctionDef | ast.ClassDef:
    node = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    return node


def _fields(definition: ast.FunctionDef | ast.ClassDef) -> dict[str, str]:
    """Return the types of the fields that a class states."""
    fields = (node for node in definition.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name))
    return {node.target.id: ast.unparse(node.annotation) for node in fields if isinstance(node.target, ast.Name)}


@functools.cache
def _keyword_types(module: ModuleType) -> dict[str, dict[str, str]]:
    """Return the types of the keyword arguments that each TypedDict of a module states, those of its bases included."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef):
            inherited = [found.get(base.id, {}) for base in node.bases if isinstance(base, ast.Name)]
            own = {name: re.sub(r"^Annotated\[(.*), Default\(.*\)\]$", r"\1", of) for name, of in _fields(node).items()}
            found[node.name] = {name: of for types in (*inherited, own) for name, of in types.items()}
    return found
