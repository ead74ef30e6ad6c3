"""`python -m irlvla`."""

from irlvla.cli import main

main()
