"""The page's style: for a phone, the dark and paper; every text has a contrast of 4.5:1."""

from __future__ import annotations

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
.skip{position:absolute;left:-99rem}
.skip:focus{position:static;display:inline-block;padding:.3rem .6rem;background:var(--tint)}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 .3rem}
h2{font-size:1.25rem;margin:2.6rem 0 .6rem;padding-top:.6rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.5rem 0 .4rem}
h4{font-size:.875rem;font-weight:600;color:var(--soft);margin:1rem 0 .2rem}
p,ul{margin:.5rem 0;max-width:46rem}
p,li,h1,h2,h3,h4,figcaption,caption{overflow-wrap:anywhere}
a{color:var(--link)}
main:focus{outline:none}
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
.said{min-width:14rem;max-width:22rem}
figure{margin:1rem 0}
figure img{display:block;width:100%;height:auto;max-width:60rem;background:#fff;
border:1px solid var(--line);border-radius:4px;padding:.5rem}
figcaption{margin-top:.4rem;max-width:46rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;font-size:.9rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
@media screen and (max-width:40rem){figure img{min-width:34rem}
body{padding:1rem .8rem 3rem}h1{font-size:1.4rem}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.4rem}th,td{padding:.28rem .5rem}}
@media print{:root{--ink:#000;--soft:#444;--paper:#fff;--line:#bbb;--tint:#f4f5f7;--link:#000;
--warn:#fff4dc;--warnline:#b97900}
body{max-width:none;font-size:10pt;padding:0}nav,.skip{display:none}.scroll{overflow:visible}
table{font-size:7pt;max-width:100%}th,td{padding:.1rem .25rem}
.num,tbody th,tbody th+td:not(:has(.reply)){white-space:normal;overflow-wrap:anywhere}
figure,tr{break-inside:avoid}h2,h3{break-after:avoid}a{color:inherit;text-decoration:none}}
"""
