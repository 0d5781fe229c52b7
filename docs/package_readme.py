"""Build hook: the README for the package index, where relative links lead nowhere, points to the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE = re.compile(r"\]\((?!https?://|#|mailto:)(?P<target>[^)\s]+)\)")


def with_absolute_links(text: str, repository: str) -> str:
    """Replace relative links of a document by links to the main branch of the repository."""
    return RELATIVE.sub(lambda link: f"]({repository}/blob/main/{link['target']})", text)


class PackageReadme(MetadataHookInterface):
    """Metadata hook of hatchling that sets the field `readme`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the description of the package."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        found = with_absolute_links(text, metadata["urls"]["Repository"])
        metadata["readme"] = {"content-type": "text/markdown", "text": found}
