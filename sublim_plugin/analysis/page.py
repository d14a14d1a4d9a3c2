"""HTML building blocks of the report: escaping, tables, figures, the page around them.

A page is one file: no script, no font, no image or style from elsewhere.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from sublim_plugin.analysis.figures import FigureFiles

_TERMINAL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?"
    r"|\x1b[PX^_][^\x1b]*(?:\x1b\\)?"
    r"|\x1b."
)
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


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


def heading(title: str) -> Html:
    return Html(f"<h3>{esc(title)}</h3>")


def paragraph(text: object, kind: str = "") -> Html:
    return Html(f'<p class="{kind}">{esc(text)}</p>' if kind else f"<p>{esc(text)}</p>")


def notice(text: object) -> Html:
    return Html(f'<p class="notice"><strong>Note.</strong> {esc(text)}</p>')


def pre(text: str, label: str) -> Html:
    return Html(f'<pre tabindex="0" aria-label="{esc(label)}">{esc(text)}</pre>')


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
        for path in (files.svg, files.png, files.csv)
    )
    return Html(
        '<figure><div class="scroll" tabindex="0" role="group" aria-label="figure, scrolls">'
        f'<img src="{files.data_uri()}" alt="{esc(files.alt)}" '
        f'style="max-width:{files.width * 8.5:.1f}rem"></div>'
        f"<figcaption>{esc(caption)} <span class=files>Files: {links}.</span></figcaption></figure>"
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


def page(title: str, body: Html) -> str:
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{esc(title)}</title>\n<style>{CSS}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


CSS = """
:root{--ink:#1d1f23;--soft:#565b64;--paper:#fff;--line:#d9dce1;--tint:#f4f5f7;--link:#0b5cad;
--warn:#fff4dc;--warnline:#b97900}
@media (prefers-color-scheme:dark){:root{--ink:#e6e7ea;--soft:#a9aeb8;--paper:#16181c;
--line:#363a42;--tint:#1f2227;--link:#7db7ff;--warn:#33290f;--warnline:#d9a53a}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:62rem;padding:1.5rem 1.25rem 4rem;color:var(--ink);
background:var(--paper);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",
Arial,sans-serif}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 .3rem}
h2{font-size:1.25rem;margin:2.6rem 0 .6rem;padding-top:.6rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.5rem 0 .4rem}
p,ul{margin:.5rem 0;max-width:46rem}
a{color:var(--link)}
a:focus-visible,[tabindex]:focus-visible{outline:2px solid var(--link);outline-offset:2px}
.soft,figcaption,caption{color:var(--soft);font-size:.875rem}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1rem;padding:0;margin:.9rem 0;
max-width:none;font-size:.925rem}
.notice{background:var(--warn);border-left:4px solid var(--warnline);padding:.6rem .9rem}
.target{margin:1.2rem 0 .3rem;font-size:1.05rem}
.findings li{margin:.45rem 0}
.rows{font-size:.8rem;color:var(--soft);white-space:normal}
.scroll{overflow-x:auto;margin:.8rem 0}
table{border-collapse:collapse;font-size:.84rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:0 0 .4rem;caption-side:top}
caption span{display:block;max-width:min(46rem,calc(100vw - 2.5rem))}
th,td{padding:.26rem .55rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
thead th{border-bottom:2px solid var(--line);vertical-align:bottom}
tbody th{font-weight:600}
.num,tbody th,tbody th+td:not(:has(.reply)){white-space:nowrap}
.num{text-align:right}
tbody th:has(.reply){white-space:normal;min-width:11rem;font-weight:400}
tr:target{background:var(--warn)}
.reply{white-space:pre-wrap;overflow-wrap:anywhere;font-family:ui-monospace,Menlo,Consolas,
"DejaVu Sans Mono",monospace;font-size:.82rem}
pre{background:var(--tint);border:1px solid var(--line);border-radius:4px;padding:.7rem .9rem;
overflow-x:auto;white-space:pre-wrap;overflow-wrap:anywhere;font-size:.82rem;line-height:1.45}
figure{margin:1rem 0}
figure img{display:block;width:100%;height:auto;max-width:60rem;background:#fff;
border:1px solid var(--line);border-radius:4px;padding:.5rem}
figcaption{margin-top:.4rem;max-width:46rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;font-size:.9rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
@media screen and (max-width:40rem){figure img{min-width:34rem}
body{padding:1rem .8rem 3rem}h1{font-size:1.4rem}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.4rem}th,td{padding:.28rem .5rem}}
@media print{body{max-width:none;font-size:10pt;padding:0;color:#000;background:#fff}
nav{display:none}.scroll{overflow:visible}table{font-size:7.5pt}th,td{padding:.1rem .3rem}
figure,tr,pre{break-inside:avoid}h2,h3{break-after:avoid}a{color:inherit;text-decoration:none}}
"""
