"""HTML building blocks of the report: escaping, tables, figures, the page around them.

A page is one file: no script, no font, no image or style from elsewhere.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from sublim_plugin.analysis.figure_files import FigureFiles
from sublim_plugin.analysis.page_style import CSS

_TERMINAL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?"
    r"|\x1b[PX^_][^\x1b]*(?:\x1b\\)?"
    r"|\x1b."
)
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


SHOWN_KEYS = 8
"""Rows named in the text; all of them are in `data-from`."""


class Html(str):
    """Text that is markup already; anything else is escaped."""

    __slots__ = ()


def clean(text: str) -> str:
    """Drop terminal escape sequences; show other control and direction characters as U+FFFD.

    Model replies and logs may hold either, and both can hide or reorder what a reader sees.
    """
    text = _TERMINAL.sub("", text.replace("\r\n", "\n"))
    return _UNSEEN.sub("\ufffd", text)


def esc(value: object) -> Html:
    """Escape anything for element text or a quoted attribute; `Html` passes through."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(clean("" if value is None else str(value)), quote=True))


def join(parts: Iterable[Html], between: str = "\n") -> Html:
    return Html(between.join(parts))


def section(anchor: str, title: str, *parts: Html) -> Html:
    return Html(
        f'<section id="{esc(anchor)}" aria-labelledby="{esc(anchor)}-title">\n'
        f'<h2 id="{esc(anchor)}-title">{esc(title)}</h2>\n{join(parts)}\n</section>'
    )


def said(text: object, file: str, keys: Sequence[str] = (), tag: str = "p") -> Html:
    """A sentence made from data: where it can be read in a CSV stands in it, and behind it.

    Args:
        keys: values in the first column of `file`; none means the file as a whole.
    """
    return Html(f"<{tag} {traced(file, keys)}>{esc(text)} {source(file, keys)}</{tag}>")


def traced(file: str, keys: Sequence[str] = ()) -> Html:
    """The attribute that names a sentence's file and rows, in full, for whoever checks it."""
    return Html(f'data-from="{esc(" ".join([file, *keys]))}"')


def source(file: str, keys: Sequence[str] = ()) -> Html:
    """A file and the first of the rows in it, as a reader sees them."""
    shown = ", ".join(keys[:SHOWN_KEYS])
    more = len(keys) - SHOWN_KEYS
    rows = f"{shown} and {more} more of " if more > 0 else f"{shown} of " if keys else ""
    return Html(f'<span class="rows">{esc(rows)}<a href="{esc(file)}">{esc(file)}</a>.</span>')


def heading(title: str) -> Html:
    return Html(f"<h3>{esc(title)}</h3>")


def paragraph(text: object, kind: str = "") -> Html:
    return Html(f'<p class="{kind}">{esc(text)}</p>' if kind else f"<p>{esc(text)}</p>")


def notice(text: object, file: str = "", keys: Sequence[str] = ()) -> Html:
    """A warning; one that is made from data names its file and rows."""
    where = f" {traced(file, keys)}" if file else ""
    after = f" {source(file, keys)}" if file else ""
    return Html(f'<p class="notice"{where}><strong>Note.</strong> {esc(text)}{after}</p>')


def pre(text: str, label: str) -> Html:
    return Html(f'<pre tabindex="0" role="region" aria-label="{esc(label)}">{esc(text)}</pre>')


def short(text: str, most: int) -> str:
    """The beginning of a text that may be of any length, and how much is left out."""
    more = len(text) - most
    return f"{text[:most]} … ({more:,} more characters)" if more > 0 else text


def items(entries: Iterable[object]) -> Html:
    return Html("<ul>" + "".join(f"<li>{esc(entry)}</li>" for entry in entries) + "</ul>")


def table(
    caption: str,
    head: Sequence[object],
    rows: Iterable[Sequence[object]],
    *,
    numeric: Sequence[int] = (),
    row_ids: Sequence[str] = (),
) -> Html:
    """A table whose first column heads each row; `numeric` columns are set flush right."""
    kinds = ['class="num"' if i in set(numeric) else "" for i in range(len(head))]
    lines = [
        f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(caption)}">',
        f"<table><caption><span>{esc(caption)}</span></caption>",
        "<thead><tr>"
        + "".join(
            f'<th scope="col" {kind}>{esc(name)}</th>'
            for name, kind in zip(head, kinds, strict=True)
        )
        + "</tr></thead><tbody>",
    ]
    for number, row in enumerate(rows):
        mark = f' id="{esc(row_ids[number])}"' if row_ids else ""
        first, *rest = row
        cells = f'<th scope="row" {kinds[0]}>{esc(first)}</th>'
        cells += "".join(
            f"<td {kind}>{esc(value)}</td>" for value, kind in zip(rest, kinds[1:], strict=True)
        )
        lines.append(f"<tr{mark}>{cells}</tr>")
    lines.append("</tbody></table></div>")
    return Html("\n".join(lines))


def figure(files: FigureFiles, caption: str) -> Html:
    """A figure inlined as SVG, with links to the files beside the page."""
    links = ", ".join(
        f'<a href="{esc(path.name)}">{path.suffix[1:].upper()}</a>'
        for path in (files.svg, files.pdf, files.png, files.csv)
    )
    return Html(
        '<figure><div class="scroll" tabindex="0" role="group" aria-label="figure, scrolls">'
        f'<img src="{files.data_uri()}" alt="{esc(files.alt)}" '
        f'style="max-width:{files.width * 8.5:.1f}rem"></div>'
        f"<figcaption {traced(files.csv.name)}>{esc(caption)} "
        f"<span class=files>Files: {links}.</span></figcaption></figure>"
    )


def facts(entries: Iterable[tuple[str, object]]) -> Html:
    """Names with their values; empty values are left out."""
    lines = [
        f"<dt>{esc(name)}</dt><dd>{esc(value)}</dd>"
        for name, value in entries
        if value not in (None, "")
    ]
    return Html(f"<dl>{''.join(lines)}</dl>") if lines else Html("")


def reply(text: str) -> Html:
    """What a model or a user said: line breaks kept."""
    return Html(f'<span class="reply">{esc(text)}</span>')


def pairs(values: dict[str, Any]) -> str:
    """Settings as "name value, name value"."""
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def body(
    title: str, status: Html, warnings: Html, sections: Sequence[tuple[str, str, Html]]
) -> Html:
    """What the body holds: heading, navigation, and the (anchor, name, content) sections."""
    links = "".join(f'<li><a href="#{anchor}">{esc(name)}</a></li>' for anchor, name, _ in sections)
    return join(
        [
            Html(f"<header><h1>{esc(title)}</h1>{status}</header>"),
            Html(f'<nav aria-label="Sections"><ul>{links}</ul></nav>'),
            Html('<main id="main" tabindex="-1">'),
            warnings,
            *[section(anchor, name, content) for anchor, name, content in sections],
            Html("</main>"),
        ]
    )


def page(title: str, body: Html) -> str:
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{esc(title)}</title>\n<style>{CSS}</style></head>\n"
        '<body>\n<a class="skip" href="#main">Skip to the answers</a>\n'
        f"{body}\n</body></html>\n"
    )
