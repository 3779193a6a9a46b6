"""`python -m soma.cli` is `soma`."""

from soma.cli import main

main()
