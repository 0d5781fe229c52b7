"""Reports: curves, tables, plots, Markdown and HTML pages."""
