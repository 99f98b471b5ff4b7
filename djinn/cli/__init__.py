"""The command line: parse, call, print. What the commands do is in the library.

Exit codes: 0 done; 1 a check, a claim or a run did not succeed; 2 bad input; 130 interrupted, 143 ended by
SIGTERM. Results go to standard output, everything else to standard error. Imports wait inside the commands, so that
help is instant.
"""

from djinn.cli.commands import main

__all__ = ["main"]
