"""`python -m pyfleet` is the `pyfleet` command."""
import sys

from pyfleet.commands import main

sys.exit(main())
