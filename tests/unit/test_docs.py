"""The pages that are written by scripts are up to date."""

import runpy
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_configuration_page_says_what_the_schema_says() -> None:
    page = runpy.run_path(str(DOCS / "configuration.py"))["page"]()
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == page, "run: python docs/configuration.py"
