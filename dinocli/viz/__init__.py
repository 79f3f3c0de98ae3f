"""Pictures, films, curves and the report of a run."""
