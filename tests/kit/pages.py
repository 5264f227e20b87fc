"""A report page, read as a test looks at it."""

from __future__ import annotations

import base64
import gzip
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """What a test looks for in a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.data: list[tuple[str | None, str, dict[str, str], str]] = []  # run, key, attributes, text
        self.links: list[str] = []
        self.scripts: dict[str, str] = {}
        self._run: str | None = None
        self._open: dict[str, str] | None = None
        self._script = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = {name: value or "" for name, value in attrs}
        self.links += [own[name] for name in ("src", "href") if name in own]
        if tag == "section":
            self._run = own.get("data-run")
        if tag == "data":
            self._open = own
        if tag == "script":
            self._script = own.get("id", "code")

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.data.append((self._run, self._open.get("data-key", ""), self._open, data))
        if self._script:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data

    def handle_endtag(self, tag: str) -> None:
        if tag == "data":
            self._open = None
        if tag == "script":
            self._script = ""
        if tag == "section":
            self._run = None

    def unpacked(self, name: str) -> str:
        return gzip.decompress(base64.b64decode(self.scripts[name])).decode()
