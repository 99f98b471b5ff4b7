"""``python -m djinn``: the command line, for an interpreter that is named."""

from djinn.cli import main

main()
