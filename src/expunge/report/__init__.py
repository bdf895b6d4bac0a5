"""Result rows to one self-contained page and its tables; reads files only, never torch."""

from expunge.report.page import write_report
from expunge.report.tables import Table, full, headline, to_csv, to_markdown

__all__ = ["Table", "full", "headline", "to_csv", "to_markdown", "write_report"]
