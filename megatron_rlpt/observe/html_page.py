"""The page that every HTML report shares: one file, light and dark, that requests nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from types import MappingProxyType

COLORS: Mapping[str, tuple[str, str]] = MappingProxyType({
    "ink": ("#1b2128", "#e6e9ed"),
    "muted": ("#5c6672", "#9ba5b1"),
    "grid": ("#d8dde4", "#343b45"),
    "page": ("#f5f6f8", "#13161a"),
    "card": ("#ffffff", "#1c2026"),
    "tint": ("#eef3f8", "#202a34"),
    "accent": ("#0b6bb5", "#58aef0"),
})  # fmt: skip
"""CSS variable -> its color in light and in dark mode."""

_STYLE = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
header { margin-bottom: 1.5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 .35rem; }
h2 { font-size: 1.2rem; letter-spacing: -0.005em; margin: 0 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p { margin: .4rem 0; max-width: 46rem; }
section { background: var(--card); border: 1px solid var(--grid); border-radius: 12px; padding: 1.4rem 1.6rem; margin: 1rem 0; }
ul { margin: .4rem 0; padding-left: 1.2rem; max-width: 46rem; }
li { margin: .3rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .45rem .75rem .45rem 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
thead th { color: var(--muted); font-weight: 500; font-size: .85rem; }
tbody th { font-weight: 500; }
tbody tr:last-child > *, tbody tr:nth-last-child(2) > [rowspan] { border-bottom: 0; }
code { font: .88em ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.meta, .note, .unit, figcaption { color: var(--muted); }
.meta { font-size: .9rem; margin: 0; }
.scroll { overflow-x: auto; }
@media print { section { break-inside: avoid; } body { background: none; } }
"""  # noqa: E501


def html_page(
    title: str,
    body: str,
    *,
    subtitle: str = "",
    colors: Mapping[str, tuple[str, str]] = MappingProxyType({}),
    style: str = "",
    script: str = "",
    data: Mapping[str, object] = MappingProxyType({}),
) -> str:
    """Return a complete page that forbids the browser to load anything, and to run anything but ``script``.

    Args:
        title: plain text; escaped here.
        body: HTML, usually ``<section>`` elements, with every text in it escaped.
        subtitle: plain text below the title; escaped here.
        colors: further CSS variables, as in ``COLORS``.
        style: further CSS rules.
        script: JavaScript of this package, run at the end of the page; the page names its hash, so that no other runs.
        data: id -> JSON values for the script, found with ``document.getElementById``. Texts in them may be hostile.

    Raises:
        ValueError: the script contains ``</script`` or ``<!--``, or a value is NaN or infinite.
    """
    every = {**COLORS, **colors}
    light, dark = (" ".join(f"--{name}: {pair[mode]};" for name, pair in every.items()) for mode in (0, 1))
    heading = html.escape(title)
    below = f'\n<p class="meta">{html.escape(subtitle)}</p>' if subtitle else ""
    end = "".join(_data_block(key, value) for key, value in data.items())
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    if script:
        end += f"<script>{script}</script>\n"
        policy += f"; script-src '{_hash(script)}'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{heading}</title>
<style>
:root {{ {light} }}
@media screen and (prefers-color-scheme: dark) {{
  :root {{ {dark} }}
}}
{_STYLE}{style}</style>
</head>
<body>
<main>
<header>
<h1>{heading}</h1>{below}
</header>
{body}
</main>
{end}</body>
</html>
"""


def _hash(script: str) -> str:
    """Return the source expression of a Content Security Policy for an inline script."""
    # The HTML parser would end the script at the first, and ignore its real end after the second.
    if any(part in script.lower() for part in ("</script", "<!--")):
        raise ValueError("a script of a page must not contain </script or <!--")
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _data_block(key: str, value: object) -> str:
    """Return JSON for a script. It is ASCII without ``<``, so that no text in it can end the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{html.escape(key)}">{text}</script>\n'
