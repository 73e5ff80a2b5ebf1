"""Reports: one HTML page and one Markdown file from the rows of runs."""

from steelyard.report.html import write_report

__all__ = ["write_report"]
