"""Settings of generation: how the words of an answer are chosen, and when it ends."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, StringConstraints, model_validator

from mmlm.config import Config

Text = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


DEEPEST = 64
"""Levels of a JSON schema."""


class GenerationConfig(Config):
    """Without any of these an answer is the most probable word after word, until the model ends it."""

    max_tokens: int | None = Field(None, ge=1, le=1 << 20)
    """Longest answer, tokens; absent: what the longest sequence of the training shards leaves room for."""
    temperature: float = Field(0.0, ge=0, le=100, allow_inf_nan=False)
    """0 takes the most probable token. Above, tokens are drawn by their probabilities, logits being divided by this."""
    top_k: int | None = Field(None, ge=1)
    """Draw among this many most probable tokens only (Fan et al. 2018)."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw among the fewest tokens that together have this probability only (Holtzman et al. 2020)."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Draw among tokens only that have at least this share of the most probable one's probability (Nguyen et al. 2024)."""
    repetition_penalty: float = Field(1.0, ge=0.01, le=100, allow_inf_nan=False)
    """Positive logits of tokens that the answer has already are divided by this, negative ones multiplied (Keskar et al.
    2019, section 4.1); 1 is none."""
    beams: int = Field(1, ge=1, le=64)
    """Keep this many unfinished answers side by side and give the best one in the end; 1 keeps one."""
    length_penalty: float = Field(1.0, ge=-10, le=10)
    """Of beam search: answers are compared by log-probability / tokens ^ this; larger prefers longer ones."""
    stop: tuple[Text, ...] = Field((), max_length=16)
    """The answer ends before the first of these texts that would appear in it."""
    choices: tuple[Text, ...] = Field((), max_length=1000)
    """The answer is one of these texts, word for word."""
    json_schema: dict[str, Any] | None = None
    """The answer is JSON that follows this schema."""
    seed: int = Field(0, ge=0, lt=1 << 64)
    """Of what is drawn. The same question with the same seed gets the same answer, whatever is asked beside it."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        drawn = [name for name in ("top_k", "top_p", "min_p") if name in self.model_fields_set]
        if drawn and not self.temperature:
            raise ValueError(
                f"{' and '.join(drawn)} choose among tokens that are drawn: give a temperature above 0, too"
            )
        if self.beams > 1 and self.temperature:
            raise ValueError("beams search for the most probable answer: leave temperature at 0")
        if "length_penalty" in self.model_fields_set and self.beams == 1:
            raise ValueError("length_penalty compares the answers of several beams: give beams above 1, too")
        if _depth(self.json_schema) > DEEPEST:
            raise ValueError(f"json_schema is nested more than {DEEPEST} deep")
        if self.choices and self.json_schema is not None:
            raise ValueError("choices and json_schema both say what the answer looks like: give one of them")
        return self

    @property
    def constrained(self) -> bool:
        return bool(self.choices) or self.json_schema is not None


def _depth(value: Any) -> int:
    """Levels of lists and objects, without calling itself: what is asked over the network may be as deep as it likes."""
    depth, level = 0, [value]
    while level := [x for x in level if isinstance(x, (dict, list))]:
        depth += 1
        level = [inner for x in level for inner in (x.values() if isinstance(x, dict) else x)]
    return depth


GREEDY = GenerationConfig()
"""The most probable token each time."""
