"""An HTML page as html.parser reads it."""

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Parsed page: `tags` (name, attributes) in order, `errors` (tags that do not close), text by section."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.errors: list[str] = []
        self.texts: list[str] = []
        self.sections: dict[str, str] = {}
        self._open: list[str] = []
        self._section = ""
        self.feed(text)
        self.close()
        self.errors += [f"<{tag}> is not closed" for tag in self._open]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "section":
            self._section = dict(attrs)["id"] or ""

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            self.errors.append(f"</{tag}> at {self.getpos()}")
        if tag == "section":
            self._section = ""

    def handle_data(self, data):
        self.texts.append(data)
        if self._section:
            self.sections[self._section] = self.sections.get(self._section, "") + data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def section(self, key: str) -> str:
        return " ".join(self.sections[key].split())

    def all(self, tag: str, css_class: str = "") -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and set(css_class.split()) <= set((a.get("class") or "").split())]
