import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

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


def policy(page):
    return re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]


def test_only_the_script_that_a_page_is_made_with_may_run():
    assert "script-src" not in policy(html_page("Title", ""))  # default-src 'none' forbids all
    page = html_page("Title", "", script="start();")
    digest = base64.b64encode(hashlib.sha256(b"start();").digest()).decode()
    assert policy(page).endswith(f"script-src 'sha256-{digest}'")
    assert "<script>start();</script>" in page
    for text in ("a('</SCRIPT>')", "a('<!--')"):
        with pytest.raises(ValueError, match="must not contain"):
            html_page("Title", "", script=text)


def test_no_text_ends_the_data_of_a_page():
    hostile = {"text": "</script><script>alert(1)</script><!-- \u2028 \ud83d", "values": [1.5, None, True]}
    page = html_page("Title", "", data={"numbers": hostile})
    block = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(block) == hostile
    assert "<" not in block
    assert block.isascii()
    with pytest.raises(ValueError, match="JSON compliant"):
        html_page("Title", "", data={"numbers": float("nan")})
