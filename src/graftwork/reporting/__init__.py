"""Reports: curves, tables, pictures, Markdown and HTML pages."""
