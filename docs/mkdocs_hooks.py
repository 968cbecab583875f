"""Show what reStructuredText is in docstrings as a reader expects it; mkdocs calls this for each page."""

import re

ROLE = re.compile(r":(?:attr|class|func|meth|mod):(<code>)~?")


def on_page_content(html: str, **_: object) -> str:
    """Drop the names of roles (``:func:`x```), and the second colon before an example."""
    return ROLE.sub(r"\1", html).replace("::</p>", ":</p>")
