"""Formulas as MathML: every browser shows it, without a script, and without a file of another site."""

import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

_FUNCTION = re.compile(r"(?<!<msub>)<mi>(log|ln)</mi>")


def mathml(formula: str, display: str) -> str:
    r"""Return a formula of LaTeX as MathML, with what `latex2mathml` leaves to the browser and browsers leave out.

    Example:
        >>> mathml(r"\log p", "inline").partition("<mrow>")[2].removesuffix("</mrow></math>")
        '<mi>log</mi><mspace width="0.167em"/><mi>p</mi>'
    """
    text = convert(formula.replace(r"\_", "_"), display=display)
    return _FUNCTION.sub(r'<mi>\1</mi><mspace width="0.167em"/>', text)


def _inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _display(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="formula">{mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Make it one of Sphinx's renderers, which `html_math_renderer` names."""
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
