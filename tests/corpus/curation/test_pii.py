"""Personal data: what must be found, what must be left, in tables."""

from __future__ import annotations

import pytest

from mmlm.corpus.curation.config import PiiConfig
from mmlm.corpus.curation.pii import Scrubber, find

ALL = ("email", "phone", "national_id", "card", "iban", "ip")

FOUND = [
    # text with the value between ‹ ›, kind
    ("write to ‹john.doe+news@mail.example.co.uk›.", "email"),
    ("联系‹zhangsan@163.com›谢谢", "email"),
    ("邮箱：‹ｚｈａｎｇ＠ｑｑ．ｃｏｍ›。", "email"),
    ("邮箱‹zhang @ 163 . com›", "email"),
    ("‹john [at] example [dot] org›", "email"),
    ("<‹a_b@c-d.io›>", "email"),
    ("我的手机‹13812345678›，谢谢", "phone"),
    ("手机：‹１３８１２３４５６７８›", "phone"),
    ("‹138 1234 5678›", "phone"),
    ("‹138-1234-5678›", "phone"),
    ("‹+86-138-1234-5678›", "phone"),
    ("‹+8613812345678›", "phone"),
    ("打‹010-62345678›找我", "phone"),
    ("‹(0571) 8765 4321›", "phone"),
    ("（电话‹０１０－６２３４５６７８›）", "phone"),
    ("电话：‹8765 4321›", "phone"),
    ("call ‹+44 20 7946 0958› now", "phone"),
    ("call ‹+1 (212) 555-0123›", "phone"),
    ("‹(212) 555-0123›", "phone"),
    ("or ‹212-555-0123›, ask for Bob", "phone"),
    ("au ‹06 12 34 56 78›", "phone"),
    ("‹+34 612 345 678›", "phone"),
    ("Tel. ‹612 345 678›", "phone"),
    ("‹020 7946 0958›", "phone"),
    ("my ssn is ‹536-22-1234›", "national_id"),
    ("SSN: ‹536221234›", "national_id"),
    ("身份证‹11010519491231002X›。", "national_id"),
    ("身份证号：‹１１０１０５１９４９１２３１００２Ｘ›", "national_id"),
    ("‹110105 19491231 002x›", "national_id"),
    ("DNI ‹12345678Z›", "national_id"),
    ("DNI ‹12.345.678-Z›", "national_id"),
    ("NIE ‹X1234567L›", "national_id"),
    ("NINO ‹AB 12 34 56 C›", "national_id"),
    ("‹4111 1111 1111 1111› exp 12/29", "card"),
    ("卡号‹4111111111111111›", "card"),
    ("‹5555-5555-5555-4444›", "card"),
    ("‹3782 822463 10005›", "card"),
    ("银联‹6200000000000005›", "card"),
    ("‹GB82 WEST 1234 5698 7654 32›", "iban"),
    ("‹DE89370400440532013000›", "iban"),
    ("IBAN FR: ‹FR14 2004 1010 0505 0001 3M02 606› BIC", "iban"),
    ("from ‹192.168.1.20›:8080", "ip"),
    ("‹2001:db8::ff00:42:8329›", "ip"),
]

LEFT = [
    "logo@2x.png", "meet @ noon", "me @ example.com", "git@github.com:a/b.git", "react@18.2.0", "@zhangsan", "a@b",
    "3.14159265358979", "圆周率3.1415926535897932384626", "price 1,234,567.89", "2024-01-01 12:00:00 +0000",
    "4111111111111112", "1234567890123456", "4111 1111 1111 1112", "0000000000000000", "0x4111111111111111ab",
    "id_13812345678", "0.13812345678", "12812345678", "138123456789", "1700000000000", "a13812345678b",
    "11010519491231002 1", "110105194912310021", "990105194912310021", "110105194902300025", "12345678A", "X1234567A",
    "000-12-3456", "666-12-3456", "900-12-3456", "536-00-1234", "2023-12-31-00123", "536-22-12345",
    "GB82 WEST 1234 5698 7654 33", "DE8937040044053201300", "AA12 3456 7890 1234", "BG 12 34 56 A",
    "100 200 3000", "010 20", "x+12345678901", "isbn 978-3-16-148410-0", "1-800", "12-34-56", "tel aviv 2024",
    "v1.2.3.4", "版本2.13.0.1", "127.0.0.1", "1.2.3.4.5", "999.1.1.1", "std::vector<int>", "12:30:45",
    "550e8400-e29b-41d4-a716-446655440000", "d41d8cd98f00b204e9800998ecf8427e", "x = [1, 2, 3]; y = 10 ** 15",
    "Lisp cons cell. (2014-11-09)", "phone (2014-11-09)", "tel 2014.11.09", "今年是2024年，共有12345678人", "第110105号文件", "http://example.com/a/13812345678x",
]  # fmt: skip


@pytest.mark.parametrize(("marked", "kind"), FOUND)
def test_found(marked: str, kind: str) -> None:
    begin, end = marked.index("‹"), marked.index("›") - 1
    text = marked.replace("‹", "").replace("›", "")
    assert find(text, ALL) == [((begin, end), kind)]


@pytest.mark.parametrize("text", LEFT)
def test_left(text: str) -> None:
    assert find(text, ALL) == []
    assert find(f"中文{text}中文", ALL) == [] or text in ("2001:db8::1",)


def test_only_the_kinds_that_are_asked_for() -> None:
    text = "a@b.com 13812345678 11010519491231002X"
    assert [k for _, k in find(text, ("phone",))] == ["phone"]
    assert [k for _, k in find(text, ALL)] == ["email", "phone", "national_id"]
    assert PiiConfig().kinds == ("email", "phone", "national_id", "card", "iban")


def test_a_tag_stands_instead_and_nothing_else_changes() -> None:
    clean, found = Scrubber(PiiConfig()).scrub(
        "张三（１３８１２３４５６７８）, a@b.com and c@d.org; Ｆｕｌｌ　ｗｉｄｔｈ stays"
    )
    assert clean == "张三（<phone>）, <email> and <email>; Ｆｕｌｌ　ｗｉｄｔｈ stays"
    assert found == {"phone": 1, "email": 2}
    assert Scrubber(PiiConfig(tag="[REMOVED]")).scrub("a@b.com")[0] == "[REMOVED]"


def test_a_hash_keeps_equal_values_equal_and_depends_on_the_salt() -> None:
    one = Scrubber(PiiConfig(action="hash", salt="s"))
    text, _ = one.scrub("13812345678 / １３８ １２３４ ５６７８ / 13912345678 / A@b.com / a@B.com")
    first, same, other, mail, same_mail = text.split(" / ")
    assert first == same != other and first.startswith("<phone:")
    assert mail == same_mail
    assert one.scrub(text) == (text, {})
    assert Scrubber(PiiConfig(action="hash", salt="t")).scrub("13812345678")[0] != first


def test_a_tag_that_cannot_be_filled_in_is_refused() -> None:
    with pytest.raises(ValueError, match="only"):
        PiiConfig(tag="<{what}>")
    with pytest.raises(ValueError, match="where the hash goes"):
        PiiConfig(action="hash", tag="[REMOVED]")


def test_scrubbing_twice_is_scrubbing_once() -> None:
    for action in ("redact", "hash"):
        scrubber = Scrubber(PiiConfig(action=action, kinds=ALL))
        for marked, _ in FOUND:
            once, _ = scrubber.scrub(marked.replace("‹", "").replace("›", ""))
            assert scrubber.scrub(once) == (once, {})


HOSTILE = [
    "1" * 200_000, "a" * 200_000 + "@", "1 " * 100_000, "+1(" * 60_000, "a." * 100_000, "@a" * 100_000, ":" * 200_000,
    "DE89" * 50_000, "tel " * 50_000, "1-" * 100_000, "a@b.com 13812345678 " * 20_000, "[at]" * 50_000,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.timeout(20)
def test_hostile_texts_take_no_longer_than_others(text: str) -> None:
    spans = [span for span, _ in find(text, ALL)]
    ends = [place for span in spans for place in span]
    assert ends == sorted(ends) and all(0 <= place <= len(text) for place in ends)


def test_what_lies_far_from_everything_else_is_found_too() -> None:
    """The patterns look only around digits and signs; their surroundings are wide enough."""
    for marked, kind in FOUND:
        text = marked.replace("‹", "").replace("›", "")
        apart = "".join(f"{'words 字 ' * 200}{text}\n" for _ in range(3))
        assert [k for _, k in find(apart, ALL)] == [kind] * 3
