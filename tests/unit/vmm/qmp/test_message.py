"""The framer and the parser, byte by byte and with what hostile clients send."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.qmp import message
from vmm.qmp.errors import QmpError
from vmm.qmp.message import MAX_DEPTH, MAX_VALUE, Framer

STOP = b'{"execute":"stop"}'
CONT = b'{"execute":"cont"}'


def frames(*pieces: bytes) -> list[object]:
    framer = Framer()
    return [frame if isinstance(frame, bytes) else str(frame)
            for piece in pieces for frame in framer.feed(piece)]


def values(*pieces: bytes) -> list[bytes]:
    return [frame for frame in frames(*pieces) if isinstance(frame, bytes)]


def errors(*pieces: bytes) -> list[str]:
    return [frame for frame in frames(*pieces) if isinstance(frame, str)]


def test_no_newline_is_needed():
    assert frames(STOP) == [STOP]


def test_values_follow_each_other():
    assert frames(STOP + CONT + b"\r\n  " + STOP + b"\n") == [STOP, CONT, STOP]


def test_value_in_single_bytes():
    text = b'{"execute":"a\\"}{[","id":[{},"\\\\"]} ' + CONT
    pieces = [text[i:i + 1] for i in range(len(text))]
    assert frames(*pieces) == [text[:-len(CONT) - 1], CONT]


def test_brackets_and_escapes_in_strings_do_not_count():
    text = b'{"execute":"}{][\\"\\\\"}'
    assert frames(text) == [text]


def test_newlines_inside_a_value():
    text = b'{\n  "execute":\n"stop"\r\n}'
    assert frames(text) == [text]


@pytest.mark.parametrize("garbage", [
    b"stop", b"123", b'"text"', b"null ", b"}", b"]", b"\x00", b"\xc3\x28", b"GET / HTTP/1.1\r",
])
def test_garbage_is_one_error_and_ends_with_the_line(garbage):
    got = frames(garbage + b"\n" + STOP)
    assert len(got) == 2
    assert "Invalid JSON" in str(got[0])
    assert got[1] == STOP


def test_garbage_is_answered_before_its_line_ends():
    assert len(errors(b"stop")) == 1
    assert frames(b"sto", b"p ple", b"ase", STOP)[1:] == [STOP]


def test_value_of_the_largest_size():
    text = b'{"execute":"' + b"a" * (MAX_VALUE - 14) + b'"}'
    assert len(text) == MAX_VALUE
    assert frames(text, CONT) == [text, CONT]


@pytest.mark.parametrize("chunk", [1000, 65536, 1 << 20])
def test_too_long_a_value_is_one_error_and_skipped(chunk):
    text = b'{"execute":"' + b"a{" * MAX_VALUE + b'","x":[{}]}' + STOP
    got = frames(*(text[i:i + chunk] for i in range(0, len(text), chunk)))
    assert len(got) == 2
    assert "longer than 65536 bytes" in str(got[0])
    assert got[1] == STOP


def test_one_byte_too_long():
    text = b'{"execute":"' + b"a" * (MAX_VALUE - 13) + b'"}'
    got = frames(text + CONT)
    assert "longer than" in str(got[0])
    assert got[1:] == [CONT]


def test_too_long_without_an_end_goes_on_at_the_next_line():
    assert frames(b"[" * (MAX_VALUE + 5000) + b"\n", STOP)[1:] == [STOP]
    assert frames(b'{"a":"' + b"x" * (MAX_VALUE + 5000) + b"\n", STOP)[1:] == [STOP]


def test_skipping_holds_nothing():
    framer = Framer()
    list(framer.feed(b'{"a":"'))
    for _ in range(100):
        list(framer.feed(b"x" * 65536))
    assert len(framer._buffer) <= MAX_VALUE


def test_depth_is_bounded():
    deepest = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert frames(deepest) == [deepest]
    got = frames(b"[" * 5000 + b"]" * 5000 + STOP)
    assert len(got) == 2
    assert "more than 64" in str(got[0])
    assert got[1] == STOP


@pytest.mark.parametrize("broken", [
    b'{"execute":"quit"', b'{"execute":"quit","arguments":{}', b'{"execute":"quit" ',
])
def test_missing_bracket_costs_one_command_only(broken):
    got = frames(broken + b"\r\n" + STOP)
    assert len(got) == 2
    assert got[1] == STOP


def test_brackets_must_match():
    got = frames(b'{"a":[}' + STOP)
    assert "isn't open" in str(got[0])
    assert got[1:] == [STOP]


def test_line_end_inside_a_string():
    got = frames(b'{"execute":"quit\n' + STOP)
    assert "line end" in str(got[0])
    assert got[1:] == [STOP]
    assert frames(b'{"execute":"quit\\\n' + STOP)[1:] == [STOP]


@pytest.mark.parametrize("before", [b"", b'{"a":"', b'{"a":[', b'{"a":"\\', b"[" * 100])
def test_byte_ff_forgets_what_is_incomplete(before):
    assert values(before + b"\xff" + STOP) == [STOP]


def test_idle():
    framer = Framer()
    assert framer.idle
    list(framer.feed(b'{"execute"'))
    assert not framer.idle
    list(framer.feed(b':"stop"} '))
    assert framer.idle


@pytest.mark.parametrize(("text", "reason"), [
    (b'{"execute":"stop",}', "at character"),
    (b"{'execute':'stop'}", "at character"),
    (b"[]", "object"),
    (b'[{"execute":"stop"}]', "object"),
    (b'{"execute":"\xff"}', "UTF-8"),
    (b'{"execute":"\xc3("}', "UTF-8"),
    (b'{"execute":"\xed\xa0\x80"}', "UTF-8"),
    (b'{"id":1,"id":2}', "'id' appears twice"),
    (b'{"execute":"stop","arguments":{"a":1,"a":1}}', "'a' appears twice"),
    (b'{"id":1e999}', "out of range"),
    (b'{"id":-1e999}', "out of range"),
    (b'{"id":NaN}', "NaN"),
    (b'{"id":-Infinity}', "-Infinity"),
    (b'{"id":' + b"9" * 5000 + b"}", "too many digits"),
    (b'{"a":"\t"}', "at character"),
    (b'{"a":"\\x"}', "at character"),
    (b'{"a":"\\u12"}', "at character"),
    (b'\xef\xbb\xbf{"a":1}', "at character"),
])
def test_parse_refuses(text, reason):
    with pytest.raises(QmpError, match=reason):
        message.parse(text)


def test_parse_takes_what_json_allows():
    text = '{"execute":"sto\\u0070","id":["ü",1.5,-0,1e3,null,{"a":[]}],"x":"\\ud800"}'
    assert message.parse(text.encode()) == json.loads(text)


def test_lone_surrogate_can_be_sent_back():
    parsed = message.parse(b'{"id":"\\ud800"}')
    assert message.reply({}, parsed) == b'{"return":{},"id":"\\ud800"}\r\n'


def test_wire_forms():
    assert message.reply({}, {}) == b'{"return":{}}\r\n'
    assert message.reply([], {"id": None}) == b'{"return":[],"id":null}\r\n'
    assert message.event("STOP", {}, 1583908726_162739_999) == (
        b'{"event":"STOP","data":{},"timestamp":{"seconds":1583908726,"microseconds":162739}}\r\n')
    assert message.error_reply(QmpError("what", "hint"), {"id": 1}) == (
        b'{"error":{"class":"GenericError","desc":"what; hint"},"id":1}\r\n')


@pytest.mark.parametrize("error", [
    QmpError(""), QmpError("\n \n"), ValueError(), QmpError(" a\nb"),
])
def test_description_is_one_line_and_never_empty(error):
    described = json.loads(message.error_reply(error, {}))["error"]
    assert described["desc"].strip()
    assert "\n" not in described["desc"]


def test_description_is_bounded():
    assert len(json.loads(message.error_reply(QmpError("x" * 60000), {}))["error"]["desc"]) < 1100


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False,
                                                                      allow_infinity=False),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children,
                                                                      max_size=4), max_leaves=20)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.dictionaries(st.text(), json_values, max_size=4), max_size=5), st.data())
def test_any_objects_in_any_pieces_come_out_whole(objects, data):
    blank = st.sampled_from(["", " ", "\n", "\r\n", "\t"])
    stream = "".join(json.dumps(o, ensure_ascii=data.draw(st.booleans())) + data.draw(blank)
                     for o in objects).encode("utf-8", "surrogatepass")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    bounds = [0, *cuts, len(stream)]
    framer = Framer()
    out = [frame for a, b in pairwise(bounds)
           for frame in framer.feed(stream[a:b])]
    assert [json.loads(frame) for frame in out if isinstance(frame, bytes)] == objects
    assert len(out) == len(objects)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=200) | st.text('{}[]":,\\ \na1', max_size=60).map(str.encode),
                max_size=8))
def test_after_any_garbage_a_reset_gives_the_next_command(pieces):
    framer = Framer()
    for piece in pieces:
        for frame in framer.feed(piece):
            if isinstance(frame, bytes):
                try:
                    assert isinstance(message.parse(frame), dict)
                except QmpError:
                    pass
    out = list(framer.feed(b"\xff" + STOP))
    assert out[-1] == STOP
    assert framer.idle
