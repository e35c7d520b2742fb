"""What mkdocs does besides building: it refuses a page that would load something from elsewhere."""

from __future__ import annotations

import re
from typing import Any

from mkdocs.exceptions import PluginError

_LOADED = re.compile(r"<(?:script|img|iframe|source)\b[^>]*\bsrc(?:set)?=[\"']?(?:https?:)?//|<link\b[^>]*>", re.I)
_ELSEWHERE = re.compile(r"\bhref=[\"']?(?:https?:)?//", re.I)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Links that a reader follows may lead anywhere; scripts, styles, fonts and pictures are the site's own."""
    for match in _LOADED.finditer(output):
        tag = match.group()
        if not tag.lower().startswith("<link") or _ELSEWHERE.search(tag):
            raise PluginError(f"{page.file.src_uri}: loads something from elsewhere: {tag}")
    return output
