"""Personal data in texts: what has a form that can be checked, in English, Chinese and a few European writings.

Precision comes first: a number counts only with its checksum, its prefix or its usual grouping, so that long numbers in
code, prices, dates and versions stay as they are. Full-width digits and signs are read as their plain forms, and
Chinese characters may stand directly before and after.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date

from mmlm.corpus.curation.config import PiiConfig
from mmlm.corpus.curation.names import names_in

_PLAIN = str.maketrans(
    {**{chr(0xFF01 + k): chr(0x21 + k) for k in range(94)}, "\u3000": " ", "\u00a0": " ", "\u2010": "-",
     "\u2011": "-", "\u2012": "-", "\u2013": "-", "\u2014": "-", "\u2212": "-"}
)  # fmt: skip
"""One character for one character, so that places in the plain text are places in the text."""
_BEFORE = r"(?<![A-Za-z0-9_])(?<![0-9][.,])"
_AFTER = r"(?![A-Za-z0-9_])(?![.,][0-9])"

Span = tuple[int, int]
Finder = Callable[[str, int, int], Iterator[Span]]
"""(text, from, to) → what lies there"""


class Scrubber:
    """Finds personal data and puts a tag, or a tag with a keyed hash, in its place."""

    def __init__(self, config: PiiConfig) -> None:
        self.config = config

    def scrub(self, text: str) -> tuple[str, dict[str, int]]:
        """(the text without them, kind → how many were found). Scrubbing again changes nothing."""
        spans = find(text, self.config.kinds)
        pieces, at = [], 0
        for (begin, end), kind in spans:
            pieces += [text[at:begin], self._instead(kind, text[begin:end])]
            at = end
        return "".join([*pieces, text[at:]]), dict(Counter(kind for _, kind in spans))

    def _instead(self, kind: str, value: str) -> str:
        if self.config.action != "hash":
            return self.config.tag.format(kind=kind)
        # letters only, so that no hash is taken for a number; written forms of one value have one hash
        value = "".join(c for c in value.translate(_PLAIN).lower() if c.isalnum() or c in "@._+")
        if kind in ("phone", "card"):
            value = "".join(c for c in value if c.isdigit())
        digest = hmac.digest(
            self.config.salt.encode(), f"{kind}\0{value}".encode("utf-8", "surrogatepass"), hashlib.sha256
        )
        return self.config.tag.format(kind=f"{kind}:{''.join(chr(97 + int(c, 16)) for c in digest.hex()[:16])}")


def find(text: str, kinds: tuple[str, ...]) -> list[tuple[Span, str]]:
    """(where, kind) of what was found, in order; where two overlap, the kind that is checked more strictly wins."""
    plain = text if text.isascii() else text.translate(_PLAIN)
    taken: list[tuple[Span, str]] = []
    places = {anchor: list(_windows(plain, anchor)) for anchor in (_AT, _DIGITS)}
    for kind, finder in _FINDERS.items():
        if kind not in kinds:
            continue
        whole = kind in ("ip", "name")
        for low, high in [(0, len(plain))] if whole else places[_AT if kind == "email" else _DIGITS]:
            for begin, end in finder(plain, low, high):
                at = bisect(taken, ((begin, end), kind))
                free = at == len(taken) or end <= taken[at][0][0]
                if free and (at == 0 or taken[at - 1][0][1] <= begin):
                    taken.insert(at, ((begin, end), kind))
    return taken


_AT = re.compile(r"@|[\[({] ?at ?[\])}]", re.IGNORECASE)
_DIGITS = re.compile(r"[0-9](?:[ ()./-]{0,3}[0-9]){3,}")
"""Without one of these there is no address and no number; the patterns proper look only around them."""
_REACH = 300


def _windows(text: str, anchor: re.Pattern[str]) -> Iterator[Span]:
    """Where to look: the surroundings of the anchors, those that touch joined."""
    low, high = 0, -1
    for found in anchor.finditer(text):
        if found.start() - _REACH > high >= 0:
            yield low, high
            low = found.start() - _REACH
        elif high < 0:
            low = max(0, found.start() - _REACH)
        high = min(len(text), found.end() + _REACH)
    if high >= 0:
        yield low, high


# --- e-mail

_LOCAL = r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9](?:[A-Za-z0-9._%+-]{0,62}[A-Za-z0-9_+-])?"
_DOMAIN = r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9@])"
_PROVIDER = (
    r"(?:163|126|139|qq|foxmail|sina|sohu|aliyun|yeah|gmail|googlemail|outlook|hotmail|live|msn|yahoo|icloud|proton|"
    r"protonmail|gmx|web|mail|yandex|aol|zoho) ?\. ?(?:com|net|cn|org|de|es|fr|it|uk|ru|me|co|vip)(?: ?\. ?[a-z]{2})?"
    r"(?![A-Za-z0-9])"
)
_EMAIL = re.compile(rf"{_LOCAL}@{_DOMAIN}")
_SPACED_EMAIL = re.compile(rf"{_LOCAL} ?@ ?{_PROVIDER}", re.IGNORECASE)
_SPELT_EMAIL = re.compile(
    rf"{_LOCAL} ?[\[({{] ?at ?[\])}}] ?[A-Za-z0-9-]{{1,63}}(?:(?: ?[\[({{] ?dot ?[\])}}] ?|\.)[A-Za-z0-9-]{{1,63}}){{1,4}}"
    r"(?![A-Za-z0-9])",
    re.IGNORECASE,
)
_NO_DOMAIN = {"png", "jpg", "jpeg", "gif", "webp", "svg", "bmp", "css", "js", "ts", "json", "html", "md", "py"}
"""`logo@2x.png` is a file."""


def _emails(text: str, low: int, high: int) -> Iterator[Span]:
    for pattern in (_EMAIL, _SPACED_EMAIL, _SPELT_EMAIL):
        for found in pattern.finditer(text, low, high):
            last = found[0].rpartition(".")[2].lower()
            remote = found[0].startswith("git@") and text[found.end() : found.end() + 1] == ":"
            if last not in _NO_DOMAIN and not remote:
                yield found.span()


# --- IBAN (ISO 13616): two letters, two check digits, as many characters as the country has; mod 97 is 1

_IBAN = re.compile(r"(?<![A-Za-z0-9_])[A-Z]{2}[0-9]{2}(?=[ -]?[A-Z0-9]{4})")
_IBAN_SIZE = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28,
    "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
    "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20,
    "LU": 20, "LV": 21, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18, "NO": 15,
    "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SE": 24, "SI": 19,
    "SK": 24, "SM": 27, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20,
}  # fmt: skip


def _ibans(text: str, low: int, high: int) -> Iterator[Span]:
    for found in _IBAN.finditer(text, low, high):
        size = _IBAN_SIZE.get(found[0][:2])
        held, at = "", found.start()
        while size and at < len(text) and len(held) < size:
            character = text[at]
            if character.isascii() and (character.isdigit() or character.isupper()):
                held += character
            elif character not in " -" or text[at - 1] in " -":
                break
            at += 1
        if size and len(held) == size and not re.match("[A-Za-z0-9_]", text[at : at + 1]):
            number = int("".join(str(int(c, 36)) for c in held[4:] + held[:4]))
            if number % 97 == 1:
                yield found.start(), at


# --- national ids

_RESIDENT = re.compile(
    rf"{_BEFORE}([1-8][0-9]{{5}})[ -]?((?:18|19|20)[0-9]{{6}})[ -]?([0-9]{{3}}[0-9Xx])(?![A-Za-z0-9_])(?![.,][0-9])"
)
_PROVINCES = "11 12 13 14 15 21 22 23 31 32 33 34 35 36 37 41 42 43 44 45 46 50 51 52 53 54 61 62 63 64 65 71 81 82 83"
_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_SSN = re.compile(rf"{_BEFORE}(?<![0-9]-)([0-9]{{3}})([- ])([0-9]{{2}})\2([0-9]{{4}}){_AFTER}(?!-[0-9])")
_SSN_NAMED = re.compile(
    rf"(?:SSN|social security(?: number| no\.?)?)\W{{0,3}}(?:is |: ?)?([0-9]{{3}})()([0-9]{{2}})([0-9]{{4}}){_AFTER}",
    re.I,
)
_DNI = re.compile(rf"{_BEFORE}([0-9]{{8}}|[0-9]{{2}}\.[0-9]{{3}}\.[0-9]{{3}})[ -]?([A-Z])(?![A-Za-z0-9_])")
_NIE = re.compile(rf"{_BEFORE}([XYZ])[ -]?([0-9]{{7}})[ -]?([A-Z])(?![A-Za-z0-9_])")
_DNI_LETTERS = "TRWAGMYFPDXBNJZSQVHLCKE"
_NINO = re.compile(
    r"(?<![A-Za-z0-9_])(?!BG|GB|NK|KN|TN|NT|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?[0-9]{2} ?[0-9]{2} ?[0-9]{2} ?[A-D]"
    r"(?![A-Za-z0-9_])"
)


def _national_ids(text: str, low: int, high: int) -> Iterator[Span]:
    for found in _RESIDENT.finditer(text, low, high):
        if _is_resident(found[1] + found[2] + found[3].upper()):
            yield found.span()
    for pattern in (_SSN, _SSN_NAMED):
        for found in pattern.finditer(text, low, high):
            area, group, serial = found[1], found[3], found[4]
            if area not in ("000", "666") and area < "900" and group != "00" and serial != "0000":
                yield found.start(1), found.end()
    for found in _DNI.finditer(text, low, high):
        if _DNI_LETTERS[int(found[1].replace(".", "")) % 23] == found[2]:
            yield found.span()
    for found in _NIE.finditer(text, low, high):
        if _DNI_LETTERS[int(str("XYZ".index(found[1])) + found[2]) % 23] == found[3]:
            yield found.span()
    for found in _NINO.finditer(text, low, high):
        yield found.span()


def _is_resident(number: str) -> bool:
    """A resident id of the People's Republic of China: GB 11643-1999, checksum of ISO 7064 mod 11-2."""
    try:
        date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    total = sum(w * int(c) for w, c in zip(_WEIGHTS, number, strict=False))
    return number[:2] in _PROVINCES.split() and "10X98765432"[total % 11] == number[17]


# --- payment cards: known prefixes and lengths (ISO/IEC 7812), usual groups, Luhn's checksum

_CARD = re.compile(
    rf"{_BEFORE}(?<![0-9]-)(?:[0-9]{{13,19}}|[0-9]{{4}}([ -])[0-9]{{4}}\1[0-9]{{4}}\1[0-9]{{4}}(?:\1[0-9]{{1,3}})?|"
    rf"[0-9]{{4}}([ -])[0-9]{{6}}\2[0-9]{{4,5}}|[0-9]{{6}} [0-9]{{10,13}}){_AFTER}(?!-[0-9])"
)


def _cards(text: str, low: int, high: int) -> Iterator[Span]:
    for found in _CARD.finditer(text, low, high):
        number = re.sub("[ -]", "", found[0])
        if _is_issued(number) and _luhn(number):
            yield found.span()


def _is_issued(number: str) -> bool:
    size, two, three, four = len(number), int(number[:2]), int(number[:3]), int(number[:4])
    return (
        (number[0] == "4" and size in (13, 16, 19))  # Visa
        or ((51 <= two <= 55 or 2221 <= four <= 2720) and size == 16)  # Mastercard
        or (two in (34, 37) and size == 15)  # American Express
        or (two == 62 and 16 <= size <= 19)  # UnionPay
        or ((four == 6011 or two == 65 or 644 <= three <= 649) and size in (16, 19))  # Discover
        or (3528 <= four <= 3589 and 16 <= size <= 19)  # JCB
        or ((300 <= three <= 305 or two in (36, 38, 39)) and size == 14)  # Diners Club
    )


def _luhn(number: str) -> bool:
    total = 0
    for place, character in enumerate(reversed(number)):
        digit = int(character) * (1 + place % 2)
        total += digit - 9 * (digit > 9)
    return total % 10 == 0 and len(set(number)) > 1


# --- telephone numbers

_COUNTRY_CODES = (
    "1 7 20 27 30 31 32 33 34 36 39 40 41 43 44 45 46 47 48 49 51 52 53 54 55 56 57 58 60 61 62 63 64 65 66 81 82 84 86 "
    "90 91 92 93 94 95 98 211 212 213 216 218 220 221 222 223 224 225 226 227 228 229 230 231 232 233 234 235 236 237 238 "
    "239 240 241 242 243 244 245 246 248 249 250 251 252 253 254 255 256 257 258 260 261 262 263 264 265 266 267 268 269 "
    "290 291 297 298 299 350 351 352 353 354 355 356 357 358 359 370 371 372 373 374 375 376 377 378 380 381 382 383 385 "
    "386 387 389 420 421 423 500 501 502 503 504 505 506 507 508 509 590 591 592 593 594 595 596 597 598 599 670 672 673 "
    "674 675 676 677 678 679 680 681 682 683 685 686 687 688 689 690 691 692 850 852 853 855 856 880 886 960 961 962 963 "
    "964 965 966 967 968 970 971 972 973 974 975 976 977 992 993 994 995 996 998"
)
"""Country calling codes (ITU-T E.164)."""
_CODES = frozenset(_COUNTRY_CODES.split())
_INTERNATIONAL = re.compile(rf"(?<![A-Za-z0-9_+)])\+ ?[1-9](?:[ .-]?[0-9]|[ .-]?\([0-9]{{1,4}}\)){{6,16}}{_AFTER}")
_NATIONAL = [
    re.compile(_BEFORE + r"(?<![0-9][-/])" + body + _AFTER + r"(?![-/][0-9])")
    for body in (
        r"(?:(?:\+|00)?86[ -]?)?1[3-9][0-9](?:[0-9]{8}|([ -])[0-9]{4}\1[0-9]{4})",  # Chinese mobile
        r"(?:(?:\+|00)?86[ -]?)?1[3-9][0-9]{2}([ -])[0-9]{3}\1[0-9]{4}",  # the same, as 1381 234 5678
        r"\(0(?:10|2[0-9]|[3-9][0-9]{2})\) ?[2-8](?:[0-9]{6,7}|[0-9]{2,3}[ -][0-9]{4})(?:(?:-|转)[0-9]{1,6})?",
        r"0(?:10|2[0-9]|[3-9][0-9]{2})[ -][2-8](?:[0-9]{6,7}|[0-9]{2,3}[ -][0-9]{4})(?:(?:-|转)[0-9]{1,6})?",
        r"(?:\+?1[ .-])?\([2-9][0-9]{2}\) ?[0-9]{3}[ .-][0-9]{4}",  # North America, with an area code in brackets
        r"(?:\+?1[ .-])?[2-9][0-9]{2}([.-])[0-9]{3}\1[0-9]{4}",  # or one sign between the groups
        r"0(?:20[ -][0-9]{4}[ -][0-9]{4}|1[0-9]{3}[ -][0-9]{6}|7[0-9]{3}[ -][0-9]{3}[ -]?[0-9]{3})",  # United Kingdom
        r"0[1-9](?:([ .])[0-9]{2})(?:\1[0-9]{2}){3}",  # France
        r"0[1-9][0-9]{1,3}/[0-9]{5,8}",  # Germany
    )
]
_NAMED = re.compile(
    r"(?:(?<![a-z])(?:tel(?:ephone|éfono|efon)?|phone|mobile|fax|whatsapp|móvil|tél|handy)(?:[ .]?(?:number|no|nr|num))?"
    r"|电话|電話|手机|手機|手机号|座机|传真|联系方式|联系电话|微信)"
    r"(?:号码?|號碼?)?(?: is|是|为|為)?[.:)\s]{0,3}(\+?[0-9(][0-9 ().-]{5,19}[0-9])(?![0-9])(?![A-Za-z_])(?![.,-][0-9])",
    re.IGNORECASE,
)
_DATE = re.compile(r"\(?(?:1[89]|20)[0-9]{2}([ ./-])[0-9]{1,2}\1[0-9]{1,2}(?![0-9])")


def _phones(text: str, low: int, high: int) -> Iterator[Span]:
    for found in _INTERNATIONAL.finditer(text, low, high):
        digits = re.sub("[^0-9]", "", found[0])
        if 8 <= len(digits) <= 15 and any(digits[:n] in _CODES for n in (1, 2, 3)):
            yield found.span()
    for pattern in _NATIONAL:
        for found in pattern.finditer(text, low, high):
            yield found.span()
    for found in _NAMED.finditer(text, low, high):
        if not _DATE.match(found[1]) and 7 <= len(re.sub("[^0-9]", "", found[1])) <= 15:
            yield found.span(1)


# --- addresses of machines

_IP4 = re.compile(r"(?<![A-Za-z0-9_.])[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![A-Za-z0-9_])(?!\.[0-9])")
_IP6 = re.compile(r"(?<![A-Za-z0-9_:])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![A-Za-z0-9_:])")

_VERSION = re.compile(r"(?:version|release|版本|版本号)[ :：]?$", re.IGNORECASE)


def _addresses(text: str, low: int, high: int) -> Iterator[Span]:
    for pattern in (_IP4, _IP6):
        for found in pattern.finditer(text, low, high):
            try:
                address = ipaddress.ip_address(found[0])
            except ValueError:
                continue
            if _VERSION.search(text[max(0, found.start() - 12) : found.start()]):
                continue
            # 127.0.0.1, 0.0.0.0 and :: are nobody's; `a::b` in code is no address of six or more groups
            if not (address.is_loopback or address.is_unspecified) and (address.version == 4 or len(found[0]) >= 8):
                yield found.span()


_FINDERS: dict[str, Finder] = {
    "email": _emails, "iban": _ibans, "national_id": _national_ids, "card": _cards, "phone": _phones, "ip": _addresses,
    "name": lambda text, low, high: names_in(text),
}  # fmt: skip
"""In the order in which they claim their places."""
