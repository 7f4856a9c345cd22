"""What is recommended and why: each rule is a sentence with its source, a paper's or our own figure (docs/results.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from mmlm.advise.facts import Facts, Machine
from mmlm.model.hog import takes
from mmlm.model.presets import PRESETS

CNN_UP_TO = 10_000
QUESTION = 16
"""Tokens of text a record below which it is taken for a question that is always the same."""
LSTM_UP_TO = 2_000
LOGISTIC_UP_TO = 1_000
HOG_UP_TO = 2_000
"""Different pictures up to which they are few. Measured with 630 stamps alone (docs/results.md), where histograms were 7 to 8
points above a learnt stem in both parts that were held out; three times as many is our guess of how far that reaches."""
PATCH_OF_HOG = 8
"""Pixels a side, as one cell of its histograms; with less there are hardly edges to count."""
LEAST_STEPS = 200
MARKS = 4
"""Tokens of a record that are neither text nor media: its beginning, end, `<answer>`, and what separates."""
TOKENS_A_PARAMETER = 20
EPOCHS_OF_USE = 4

HOFFMANN = "Hoffmann et al. 2022, table 3: about 20 tokens a parameter"
MUENNIGHOFF = "Muennighoff et al. 2023: up to 4 epochs are worth nearly as much as new data"
VIT = "Dosovitskiy et al. 2021, section 4.3: without pretraining on many pictures, convolutions beat patches"
HOG = "docs/results.md, stamps in folds 2 to 4: picture .548 by hog, .477 by conv; all three modalities .633, .586"
EPOCHS = "our rule: 10 to 40 epochs where answers are short (stories demo and stamps)"
EZEN = "Ezen-Can 2020: an LSTM beat BERT on a small corpus, the more so the smaller"
STAMPS = "docs/results.md: of 649 stamps the logistic regression learnt .714, the Transformer of 3.3 M parameters .603"
DIGITS = "docs/results.md, small data"
TREES = "Grinsztajn et al. 2022: on tables of about 10,000 rows, trees beat neural networks"


@dataclass(frozen=True)
class Reason:
    """Why something is as it is."""

    choice: str
    why: str
    source: str = ""


@dataclass
class Advice:
    """`model` and `settings` are the keys of a train.yaml."""

    preset: str
    model: dict[str, Any]
    settings: dict[str, Any]
    reasons: list[Reason] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


SIZES = tuple(name for name in PRESETS if name not in ("vaswani", "bert"))
"""Of the Transformer, from small to large (mmlm/model/presets.py)."""


def advise(facts: Facts, here: Machine, budget_hours: float, cost: Any) -> Advice:
    """The recommendation. `cost(model, settings)` → (parameters, hours, fits) of one choice on this machine."""
    reasons: list[Reason] = []
    kind = _kind(facts, reasons)
    settings = _settings(facts, here, kind, reasons)
    preset, model = _size(facts, kind, settings, budget_hours, cost, reasons)
    settings["optimizer"] = {"lr": _rate(model, kind, reasons)}
    return Advice(preset, model, settings, reasons, _warnings(facts))


def _kind(facts: Facts, reasons: list[Reason]) -> str:
    n = facts.train
    if facts.texts:
        if n and facts.tokens < 1e5 and not facts.media:
            reasons.append(
                Reason(
                    "kind: lstm", f"answers are texts, and {facts.tokens:,.0f} tokens are few: a state is enough", EZEN
                )
            )
            return "lstm"
        why = "answers are texts, written token by token" + (" from what is seen or heard" if facts.media else "")
        reasons.append(Reason("kind: transformer", why, "cnn answers classes only; lstm and gru lag on long records"))
        return "transformer"
    stored = any(encoder.read for encoder in facts.spec.encoders.values())
    if facts.media and n <= CNN_UP_TO and facts.tokens < QUESTION * max(n, 1) and not stored:
        why = (
            f"{n:,} records with {' and '.join(facts.media)}, answered by a class or number alone; their text, fewer than "
            f"{QUESTION} tokens a record, is taken for the question and not read"
        )
        reasons.append(Reason("kind: cnn", why, VIT))
        return "cnn"
    if not facts.media and n <= LSTM_UP_TO and facts.tokens:
        reasons.append(Reason("kind: gru", f"{n:,} texts are few for attention to learn an order from", EZEN))
        return "gru"
    why = f"{n:,} records" + (f" of {', '.join(facts.media)} and text" if facts.media else " of text")
    reasons.append(Reason("kind: transformer", f"{why} are enough, and it reads all of them together", VIT))
    return "transformer"


def _size(
    facts: Facts, kind: str, settings: dict[str, Any], budget_hours: float, cost: Any, reasons: list[Reason]
) -> tuple[str, dict[str, Any]]:
    if kind == "cnn":
        wide = facts.train > 2000
        channels = [32, 64, 128] if wide else [16, 32, 64]
        reasons.append(
            Reason(
                f"channels: {channels}",
                f"{facts.train:,} records; {'more' if wide else 'fewer'} than 2,000",
                "our rule",
            )
        )
        return "cnn", {"kind": kind, "channels": channels, "width": 128 if wide else 64, "dropout": 0.2}
    if kind in ("lstm", "gru"):
        reasons.append(
            Reason("width: 128, layers: 1", "one layer is trained in seconds and rarely beaten here", "our rule")
        )
        return kind, {"kind": kind, "width": 128, "layers": 1, "dropout": 0.2}
    trained = max(facts.tokens + facts.media_tokens, 1.0) * EPOCHS_OF_USE
    wanted = trained / TOKENS_A_PARAMETER
    name, stopped = SIZES[0], "there is no larger one"
    for other in SIZES[1:]:
        parameters, hours, fits = cost({"preset": other}, settings)
        if parameters > wanted:
            stopped = f"`{other}` has {parameters:,}"
            break
        if not fits or hours > budget_hours:
            stopped = f"`{other}` would " + (f"take {hours:,.1f} h here" if fits else "not fit into memory here")
            break
        name = other
    seen = f" and {facts.media_tokens:,.0f} of pictures and sounds" if facts.media_tokens else ""
    fed = f"{EPOCHS_OF_USE} times over, feed about {wanted:,.0f} parameters"
    why = f"{facts.tokens:,.0f} tokens of text{seen}, {fed}; {stopped}"
    reasons.append(Reason(f"preset: {name}", why, f"{HOFFMANN}; {MUENNIGHOFF}"))
    return name, {"preset": name, **_form(facts, reasons)}


def _form(facts: Facts, reasons: list[Reason]) -> dict[str, Any]:
    """What else is said of a Transformer beside its size."""
    model: dict[str, Any] = {}
    if facts.media or not facts.texts:
        model["attention"] = "prefix"
        reasons.append(
            Reason(
                "attention: prefix",
                "a question is given whole: its parts may see each other",
                "Raffel et al. 2020, 3.2.1",
            )
        )
    if _few_pictures(facts):
        model["image_stem"] = "hog"
        why = f"{facts.pictures:,} different pictures, at most {HOG_UP_TO:,}: too few to learn edges and colours from"
        reasons.append(Reason("image_stem: hog", why, HOG))
    if facts.train < 20_000:
        model["dropout"] = 0.1
        reasons.append(
            Reason("dropout: 0.1", f"{facts.train:,} records are gone through many times", "Srivastava et al. 2014")
        )
    return model


def _few_pictures(facts: Facts) -> bool:
    """Whether `image_stem: hog` is recommended: at most HOG_UP_TO different pictures, which the model reads itself,
    and patches that hold one of its cells at least, and that it takes."""
    image, encoder = facts.spec.image, facts.spec.encoders.get("image")
    read = encoder is not None and encoder.read
    return (
        image is not None
        and not read
        and 0 < facts.pictures <= HOG_UP_TO
        and image.patch >= PATCH_OF_HOG
        and takes(image.patch)
    )


def _settings(facts: Facts, here: Machine, kind: str, reasons: list[Reason]) -> dict[str, Any]:
    batch = 128 if facts.train >= 5000 else 64 if facts.train >= 500 else 32
    long = facts.spec.max_len > 512
    packs = long and kind != "cnn"
    each = _records_of_a_sequence(facts) if packs else 1.0
    batch = max(8, batch // 4) if long and kind == "transformer" else batch
    batch = max(len(here.gpus) or min(2, here.cores), round(batch / each))  # each rank has one sequence at least
    steps = _steps(facts, here, batch, each, reasons)
    data: dict[str, Any] = {"batch": batch}
    if len(facts.spec.modalities) > 1 or (facts.media and facts.tokens > 40 * facts.train):
        data["modality_dropout"] = 0.25
        reasons.append(
            Reason(
                "modality_dropout: 0.25",
                "records have several modalities, and some will lack one",
                "Neverova et al. 2015",
            )
        )
    augment = _augment(facts)
    if augment:
        data["augment"] = augment
        reasons.append(
            Reason(f"augment: {augment}", "each record is seen many times", "Park et al. 2019 (sound); our stories")
        )
    if packs:
        data["pack"] = {"kind": "best_fit"}
        reasons.append(
            Reason("pack: best_fit", "long records of many lengths: padding falls below 2 %", "docs/benchmarks.md")
        )
    precision = "bf16" if here.bf16 else "fp16" if here.gpus else "fp32"
    reasons.append(
        Reason(f"precision: {precision}", "matrix products in it are the fastest that this machine has",
               "measured on a CPU with AMX: bf16 4 to 6 times as fast as fp32" if precision == "bf16" else "")
    )  # fmt: skip
    settings: dict[str, Any] = {"steps": steps, "seed": 0, "precision": precision, "data": data}
    if facts.val >= 20:
        every = max(1, steps // 20)
        settings["validation"] = {"every": every, "patience": 6, "export": "best"}
        reasons.append(
            Reason(f"validation.every: {every}", f"{facts.val:,} records are held out: the best look is kept, and six without "
                   "a better one end it", "Prechelt 1998")
        )  # fmt: skip
    return settings


def _records_of_a_sequence(facts: Facts) -> float:
    """How many records packing puts into one sequence, about; at least one."""
    fields = len(facts.spec.fields.names) if facts.spec.fields else 0
    length = (facts.tokens + facts.media_tokens) / max(facts.train, 1) + fields + MARKS
    return max(1.0, facts.spec.max_len / length)


def _steps(facts: Facts, here: Machine, batch: int, each: float, reasons: list[Reason]) -> int:
    """As many as make a number of epochs, between the fewest that teach anything and the most that this machine is asked for.
    `each`: records of one of the `batch` sequences of a step."""
    epochs = 4 if facts.texts and facts.tokens > 5e6 else 40 if facts.train < 20_000 else 10
    most = 20_000 if here.gpus else 2000
    wanted, once = (math.ceil(times * facts.train / (batch * each)) for times in (epochs, 1))
    steps = min(max(wanted, LEAST_STEPS), max(most, once))
    times = steps * batch * each / max(facts.train, 1)
    why, source = f"{times:,.1f} times through the data", MUENNIGHOFF if epochs == 4 else EPOCHS
    if steps > wanted:
        why += f", where {epochs} would be {wanted} steps: fewer than {LEAST_STEPS} hardly move the weights, however few records"
        source = "our rule; watch the validation split, since so many epochs learn records by heart"
    elif steps < wanted:
        limit = (
            "once is the least"
            if steps == once
            else f"{most:,} steps are the most that a machine like this is asked for"
        )
        why, source = f"{why}, where {epochs} would be {wanted:,} steps: {limit}", "our rule"
    reasons.append(Reason(f"batch: {batch}, steps: {steps}", why, source))
    return steps


def _augment(facts: Facts) -> dict[str, Any]:
    """Of what the model reads itself: what an encoder made of a picture or sound is stored, and changes no more."""
    if facts.train >= 50_000:
        return {}
    found: dict[str, Any] = {}
    if facts.spec.image and not facts.spec.encoder("image"):
        found["shift"] = max(1, facts.spec.image.size // 16)
    if facts.spec.audio and not facts.spec.encoder("audio"):
        found["time_mask"] = 0.1
    return found


def _rate(model: dict[str, Any], kind: str, reasons: list[Reason]) -> float:
    width = int(model["width"] if "width" in model else PRESETS[model["preset"]].fields["width"])
    rate = float(f"{max(2e-4, min(3e-3, 3e-3 * 128 / width)):.2g}") if kind == "transformer" else 2e-3
    source = (
        "Yang et al. 2022, table 3: 1 / width; 3e-3 at 128 in the story demo" if kind == "transformer" else "our rule"
    )
    reasons.append(Reason(f"lr: {rate:g}", f"a width of {width}", source))
    return rate


def _warnings(facts: Facts) -> list[str]:
    found = []
    if not facts.spec.tasks:
        found.append("no task was found: nothing can be learnt; give the records labels or answers")
    if facts.spec.fields and not facts.media and facts.tokens < 20 * max(facts.train, 1):
        found.append(f"these are tables of numbers and categories: look at the row `logistic` first ({TREES})")
    elif not facts.texts and facts.train <= LOGISTIC_UP_TO:
        found.append(f"{facts.train:,} records: expect the report's row `logistic` to be as good or better ({STAMPS})")
    if facts.texts and facts.media and facts.classes and facts.train <= CNN_UP_TO:
        found.append(
            f"{facts.train:,} records are few for words: where the class is enough, ask for it alone (no answer texts in "
            f"scan.yaml), and a cnn will do ({DIGITS})"
        )
    if 0 < facts.test < 200:
        half = 1.96 * math.sqrt(0.25 / facts.test)
        found.append(
            f"{facts.test} test records: an accuracy near .5 is known to ± {half:.2f} only (binomial, 95 %); "
            "more test records or several splits tell more than any setting"
        )
    if facts.classes and facts.train / facts.classes < 20:
        found.append(f"about {facts.train / facts.classes:.0f} records a class: merge rare classes, or collect more")
    return found
