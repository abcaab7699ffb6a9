"""An HTML page as a test reads it."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """All tags of a page; fails where they do not nest."""

    VOID = ("meta", "br", "wbr")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words, self.attributes = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.open.append(tag)
        if tag in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def check_harmless(text):
    """The page loads and runs nothing, and refers to nothing but to parts of itself. Returns it parsed."""
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "a", "image", "form"} & set(page.tags)
    references = [value for name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert all(value.startswith("#") for value in [*references, *re.findall(r"url\((.*?)\)", text)])
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "@import" not in text and not re.search(r"https?://|//[a-z]+\.[a-z]", text)
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'\"" in text
    return page
