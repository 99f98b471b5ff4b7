"""Errors written for the person who reads them: what is wrong, where, which value, what to do.

Every error that bad input can cause derives from :class:`DjinnError`, so that the command line and the
notebooks can show its message alone, without a traceback.
"""


class DjinnError(Exception):
    """Something the user can act on; the message says what and how."""


class ConfigError(DjinnError):
    """A profile, a parameter or a size that cannot be used."""


class CheckpointError(DjinnError):
    """A checkpoint that is missing, damaged, or does not fit its config."""


class PlanError(DjinnError):
    """A placement that cannot work: ring, budget, host memory, disk or memlock too small."""


class UnavailableError(DjinnError):
    """Something this machine lacks: a device, a package, a compiler, disk space."""
