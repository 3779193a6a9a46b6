"""Python source to instruction pairs: the signature and docstring ask, the function answers."""

import ast
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

DOCSTRING_CHARS = 600  # of a longer docstring the first paragraph is asked with
MIN_DOCSTRING_CHARS = 12

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class FunctionPair:
    """`name` is dotted within the file, `line` where the function starts, from 1."""

    name: str
    line: int
    prompt: str
    answer: str


def function_pairs(source: str) -> Iterator[FunctionPair]:
    """Documented functions and methods of a Python file, in order; functions inside functions are left out.

    Raises SyntaxError or ValueError where the text is not Python of this version.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            tree = ast.parse(source)
        except (RecursionError, MemoryError) as error:
            raise ValueError(f"nested too deeply ({type(error).__name__})") from None
        lines = source.split("\n")
        for name, node in _functions(tree, ""):
            docstring = ast.get_docstring(node)
            answer = _source(node, lines)
            if docstring and len(docstring) >= MIN_DOCSTRING_CHARS and _is_python(answer):
                yield FunctionPair(name, node.lineno, _prompt(name, node, docstring), answer)


def _functions(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, Function]]:
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, Function):
            yield f"{prefix}{child.name}", child


def _source(node: Function, lines: list[str]) -> str:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno])).strip("\n")


def _is_python(source: str) -> bool:
    """False where taking the indentation away broke the code (strings over several lines, one-line bodies after
    `;`).
    """
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


def _prompt(name: str, node: Function, docstring: str) -> str:
    text = docstring if len(docstring) <= DOCSTRING_CHARS else docstring.split("\n\n")[0][:DOCSTRING_CHARS]
    owner = name.rpartition(".")[0]
    what = f"method of `{owner}`" if owner else "function"
    return f"Write the Python {what} `{node.name}({ast.unparse(node.args)})`.\n\n{text.strip()}"
