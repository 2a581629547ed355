"""The benchmarks are not installed with the package: let the tests find them in the tree, after what is installed."""
import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2]))
