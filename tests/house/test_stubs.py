"""Nothing that ships is a placeholder: no empty bodies, no promises in comments, no function that only refuses."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path for folder in ("fleetcore", "pyfleet", "bench") for path in (ROOT / folder).rglob("*")
                 if path.suffix in (".py", ".pyx", ".pxd", ".h"))
LATER = re.compile(r"\b(TODO|FIXME|XXX|HACK|NotImplemented(Error)?)\b")


def is_abstract(node):
    return any("abstractmethod" in ast.unparse(decorator) or "overload" in ast.unparse(decorator)
               for decorator in node.decorator_list)


def empty_functions(source):
    """Names of functions that do nothing.

    Abstract methods may, and so may a method of a class with a contract above it, or an event hook, that says why.
    """
    tree, found = ast.parse(source), []
    under_contract = {child for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.bases
                      for child in node.body}
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_abstract(node):
            continue
        said = ast.get_docstring(node)
        rest = node.body[1:] if said else node.body
        excused = said and (node in under_contract or node.name.startswith("on_"))
        if not excused and all(isinstance(statement, ast.Pass) or (isinstance(statement, ast.Expr)
                            and isinstance(statement.value, ast.Constant)) for statement in rest):
            found.append(node.name)
    return found


def test_no_comment_promises_work_for_later():
    assert [f"{path.relative_to(ROOT)}: {line.strip()}" for path in SHIPPED
            for line in path.read_text().splitlines() if LATER.search(line)] == []


def test_no_function_is_empty():
    assert [f"{path.relative_to(ROOT)}: {name}" for path in SHIPPED if path.suffix == ".py"
            for name in empty_functions(path.read_text())] == []


@pytest.mark.parametrize(("source", "names"), [
    ("def f(): pass", ["f"]),
    ("def f():\n    'Says what.'", ["f"]),
    ("class A:\n    def m(self): ...", ["m"]),
    ("class A:\n    @abstractmethod\n    def m(self): ...", []),
    ("class A(Base):\n    def m(self): ...", ["m"]),
    ("class A(Base):\n    def m(self): 'There is nothing to close.'", []),
    ("class A:\n    def on_end(self): 'After all.'", []),
    ("def f(): return 1", []),
])
def test_the_test_knows_a_stub_when_it_sees_one(source, names):
    assert empty_functions(source) == names
