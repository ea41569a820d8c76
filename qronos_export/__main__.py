"""`python -m qronos_export`, the same as the console script."""

from qronos_export.cli import main

main()
