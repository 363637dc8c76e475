"""The part of the package's metadata that depends on where the project is published: its addresses, the README's links.

pyproject.toml names this file. The build backend runs it, in an environment without the rest of the project.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class PublishedMetadata(MetadataHookInterface):  # type: ignore[misc]
    """Fills in `urls` and `readme`, the fields that pyproject.toml leaves open."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set both fields. Without a known repository there are no addresses, and the README is as it is."""
        root = Path(self.root)
        tools = runpy.run_path(str(Path(__file__).with_name("repository.py")))
        url, ref = tools["repository_url"](root), os.environ.get("LSCE_REPOSITORY_REF") or "HEAD"
        text = (root / "README.md").read_text(encoding="utf-8")
        if url is None:
            print(
                "lsce: no LSCE_REPOSITORY_URL and no git remote `origin` with an address: "
                "built without project URLs, and with the README's relative links",
                file=sys.stderr,
            )
        else:
            text = tools["with_absolute_links"](text, "README.md", url, ref)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = tools["project_urls"](url, os.environ.get("LSCE_SITE_URL"), ref)
