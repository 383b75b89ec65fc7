"""`python -m slimtune` is `slimtune`."""

from .cli import main

main()
