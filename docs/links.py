"""
A hook of mkdocs: links that lead out of docs/, as a code host follows them, in a site that holds
docs/ alone.

Pictures come into the site. Other files and folders become links into the repository if mkdocs.yml
has a `repo_url`, and else their path in plain text. One that does not exist is a warning, which
`--strict` makes an error.
"""

import re
from logging import getLogger
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTWARD = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#]+)(#[^)]*)?\)")
logger = getLogger("mkdocs.hooks.links")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return a page's text with the links that lead out of docs/ as the site can show them."""

    def inward(link: re.Match[str]) -> str:
        picture, text, path, anchor = link.groups()
        if not (ROOT / path).exists():
            logger.warning(f"{page.file.src_uri}: there is no {path}")
            return text
        if picture or path.endswith(".png"):
            if files.get_file_from_path(path) is None:
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
            return f"{picture}[{text}]({path})"
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/HEAD/{path}{anchor or ''})"
        return f"{text} (`{path}`)"

    return OUTWARD.sub(inward, markdown)
