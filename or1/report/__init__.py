"""Everything a person sees: the live panel, the summary, tables, and the HTML page."""
