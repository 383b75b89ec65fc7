"""Shows the Markdown that `slimtune explain` prints as HTML; everything in it is escaped first."""

import re
from collections.abc import Iterator

from markupsafe import Markup, escape

_INLINE = re.compile(
    r"`(?P<code>[^`]+)`|\*\*(?P<bold>[^*]+)\*\*|\[(?P<text>[^\]]+)\]\((?P<url>[^)\s]+)\)|<(?P<plain>https?://[^>\s]+)>"
)


def render_markdown(text: str) -> Markup:
    """Return headings, paragraphs, lists, fenced code, and code, bold text and links in them, as HTML."""
    return Markup("\n").join(_render_blocks(text.splitlines()))


def _render_blocks(lines: list[str]) -> Iterator[Markup]:
    block: list[str] = []
    code: list[str] | None = None
    for line in [*lines, ""]:
        if line.startswith("```") and code is None:
            yield from _render_block(block)
            block, code = [], []
        elif line.startswith("```") and code is not None:
            yield Markup("<pre>{}</pre>").format("\n".join(code))
            code = None
        elif code is not None:
            code.append(line)
        elif not line.strip() or line.startswith("#"):
            yield from _render_block(block)
            block = []
            if line.strip():
                yield Markup("<h3>{}</h3>").format(_render_inline(line.lstrip("# ")))
        else:
            block.append(line)
    if code:  # the fence is not closed
        yield Markup("<pre>{}</pre>").format("\n".join(code).rstrip())


def _render_block(lines: list[str]) -> Iterator[Markup]:
    if not lines:
        return
    if all(line.startswith("|") for line in lines):  # a table is shown as it is written
        yield Markup("<pre>{}</pre>").format("\n".join(lines))
    elif lines[0].startswith("- "):
        items = re.split(r"\n- ", "\n".join(lines)[2:])
        yield Markup("<ul>{}</ul>").format(
            Markup("").join(Markup("<li>{}</li>").format(_render_inline(item)) for item in items)
        )
    else:
        yield Markup("<p>{}</p>").format(_render_inline(" ".join(lines)))


def _render_inline(text: str) -> Markup:
    parts, end = [], 0
    for found in _INLINE.finditer(text):
        parts.append(escape(text[end : found.start()]))
        end = found.end()
        url = found["plain"] or found["url"]
        if found["code"]:
            parts.append(Markup("<code>{}</code>").format(found["code"]))
        elif found["bold"]:
            parts.append(Markup("<b>{}</b>").format(found["bold"]))
        elif url.startswith(("https://", "http://")):
            link = Markup('<a href="{}" target="_blank" rel="noopener noreferrer">{}</a>')
            parts.append(link.format(url, found["text"] or url))
        else:  # a page of the docs, which is not served here
            parts.append(escape(found["text"]))
    return Markup("").join([*parts, escape(text[end:])])
