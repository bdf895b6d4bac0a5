"""Result rows to one self-contained page, tables and a model card; reads and writes files only, never torch."""

from expunge.report.formats import to_csv, to_latex, to_markdown
from expunge.report.page import write_report
from expunge.report.tables import Table, full, headline

__all__ = ["Table", "full", "headline", "to_csv", "to_latex", "to_markdown", "write_report"]
