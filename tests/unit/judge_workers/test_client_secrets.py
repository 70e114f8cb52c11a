"""Keys are masked in logs, however they are encoded."""

import base64
import json
from urllib.parse import quote

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlpt.judge_workers.client.secrets import Mask

WAYS = (
    lambda char: char,
    lambda char: json.dumps(char)[1:-1],
    lambda char: f"\\u{ord(char):04x}",
    lambda char: f"\\\\u{ord(char):04X}",
    lambda char: quote(char, safe=""),
    lambda char: f"%{ord(char):02X}",
    lambda char: f"%25{ord(char):02x}",
    lambda char: f"&#{ord(char)};",
    lambda char: f"&#x{ord(char):X};",
    lambda char: {'"': "&quot;", "&": "&amp;", "<": "&lt;", "'": "&apos;", "/": "&sol;"}.get(char, char),
)
KEYS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=12, max_size=40)


@settings(deadline=None)
@given(KEYS, st.data())
def test_a_key_of_which_any_part_is_escaped(key, data):
    spelt = "".join(data.draw(st.sampled_from(WAYS))(char) for char in key)
    mask = Mask(key)
    assert mask.text(f"<{spelt}>") == "<<key>>"
    assert mask.data(f"<{spelt}>".encode()) == b"<<key>>"


@settings(deadline=None)
@given(KEYS, st.sampled_from(["", ":", "user:", "Bearer "]), st.sampled_from(["", "\n", "more"]))
def test_a_key_in_base64_whatever_stands_around_it(key, before, behind):
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        spelt = encode(f"{before}{key}{behind}".encode()).decode()
        left = Mask(key).text(spelt)
        assert "<key>" in left
        assert len(left) - len("<key>") <= len(encode(f"{before}{behind}".encode())) + 4


def test_no_key_hides_nothing_and_a_short_one_nothing_but_itself():
    assert Mask("", "").text("text") == "text"
    assert Mask("abc").text("abc YWJj QWFiYw== &#97;bc") == "<key> YWJj QWFiYw== <key>"
