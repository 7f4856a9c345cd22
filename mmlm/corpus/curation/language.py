"""The language of a text: by its script where one language owns the script, else by py3langid, offline."""

from __future__ import annotations

from functools import cache
from typing import Any

from mmlm.corpus.curation.words import OWNERS, script
from mmlm.errors import ConfigError

COMMON = (
    "ar", "az", "be", "bg", "ca", "cs", "cy", "da", "de", "en", "es", "et", "eu", "fa", "fi", "fr", "ga", "gl", "hi",
    "hr", "hu", "id", "is", "it", "kk", "ky", "lt", "lv", "mk", "mn", "mr", "ne", "nl", "no", "pl", "ps", "pt", "ro",
    "ru", "sk", "sl", "so", "sq", "sr", "sv", "sw", "tl", "tr", "uk", "ur", "uz", "vi",
)  # fmt: skip
"""What py3langid chooses from unless told: its rarer languages take away short texts of their large neighbours."""
MAX_CHARS = 1_000
"""Characters of a text that are looked at."""


def identify(text: str, languages: tuple[str, ...] | None = None) -> tuple[str, float]:
    """(code, confidence from 0 to 1) of a text; ("", 0.0) when it has no letters.

    Raises ConfigError when py3langid is not installed or does not know one of `languages`.
    """
    text = text[:MAX_CHARS]
    owner = script(text)
    if len(owner) != 2:
        return _library(languages)(text) if owner else ("", 0.0)
    if languages is None or owner in languages:
        return owner, 1.0
    return "", 0.0


@cache
def _library(languages: tuple[str, ...] | None) -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise ConfigError(
            "scan.curate.language needs py3langid, which is not installed",
            cure='pip install "mmlm-workflows[curation]"',
        ) from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if unknown := sorted(set(languages or ()) - set(identifier.labels)):
        raise ConfigError(
            f"scan.curate.language.languages names {unknown[0]!r}, which cannot be told from its text",
            wanted=f"codes among {', '.join(sorted(identifier.labels))}",
        )
    chosen = [code for code in languages or COMMON if code not in OWNERS]
    if not chosen:
        return _nothing
    identifier.set_languages(chosen)
    return identifier.classify


def _nothing(text: str) -> tuple[str, float]:
    return "", 0.0
