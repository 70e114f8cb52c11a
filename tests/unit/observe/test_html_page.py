import re
from html.parser import HTMLParser

from megatron_rlpt.observe.html_page import html_page


def test_a_page_stands_alone_in_light_and_dark():
    page = html_page("Title", "<section><p>text</p></section>", colors={"own": ("#111111", "#eeeeee")}, style="p {}")
    assert page.startswith("<!doctype html>")
    assert "default-src 'none'" in page
    light, dark = page.split("prefers-color-scheme: dark")
    assert "--own: #111111;" in light
    assert "--own: #eeeeee;" in dark
    assert not re.search(r"url\(|@import|https?:|<script|<link", page)
    used = set(re.findall(r"var\(--([a-z-]+)\)", page))
    assert used <= set(re.findall(r"--([a-z-]+):", light))


def test_titles_are_escaped():
    seen = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attributes):
            seen.append(tag)

    hostile = "</title><script>alert(1)</script>"
    Tags().feed(html_page(hostile, "", subtitle=hostile))
    assert "script" not in seen
