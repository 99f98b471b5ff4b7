"""What a reviewer receives: notebooks run in order, claims, provenance and the report of a run."""

import warnings

# Libraries look for notebook widgets when they are imported; text is what an executed notebook keeps.
warnings.filterwarnings("ignore", message="IProgress not found")
