"""``python -m mla`` is the command ``mla``."""

from mla.cli import main

main()
