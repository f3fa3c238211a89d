"""Settings of Sphinx, which builds the documentation site: ``make docs``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REPOSITORY = "https://github.com/gptconvert/gptconvert"
#: A link to a file by its path.
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")

project = "gptconvert"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "gptconvert"
html_theme_options = {"source_repository": REPOSITORY, "source_branch": "main", "source_directory": "docs/"}
html_show_copyright = False
html_copy_source = False
html_use_index = False  # nothing is indexed
highlight_language = "none"
myst_heading_anchors = 3  # GitHub's names of headings, which links in the pages use
smartquotes = False  # pages quote commands and messages


def link_to_repository(app: Any, page: str, source: list[str]) -> None:
    """Files outside docs/ are not part of the site: link to the repository instead."""
    folder = (HERE / page).parent

    def absolute(link: re.Match[str]) -> str:
        path = (folder / link[1]).resolve()
        return link[1] if path.is_relative_to(HERE) else f"{REPOSITORY}/blob/main/{path.relative_to(HERE.parent)}"

    source[0] = LINK.sub(absolute, source[0])


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", link_to_repository)
