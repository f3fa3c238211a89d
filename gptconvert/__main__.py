"""``python -m gptconvert``."""

from gptconvert.cli import main

main()
