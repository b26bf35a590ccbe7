"""One self-contained HTML page of what was mapped onto what, and how well."""

from streamx.report.run import report

__all__ = ["report"]
