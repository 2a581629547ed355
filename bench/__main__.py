"""`python -m bench [NAME [options]]`: list the benchmarks, or run one."""
import ast
import importlib
import importlib.util
import pathlib
import sys

from bench import BENCHMARKS


def purpose(module: str) -> str:
    """The first docstring line of a module, read without importing it."""
    source = pathlib.Path(importlib.util.find_spec(module).origin).read_text()
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def main(argv: list[str]) -> int:
    """Run the benchmark that argv names; list them all when it names none."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m bench NAME [options]      (python -m bench NAME --help lists the options)\n")
        for name, module in BENCHMARKS.items():
            print(f"  {name:<12}{purpose(module)}")
        return 0
    if argv[0] not in BENCHMARKS:
        print(f"no benchmark called {argv[0]!r}; there are: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    return importlib.import_module(BENCHMARKS[argv[0]]).main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
