"""What the names of columns say: which mean a number of the row, a group, a text, a label."""

from __future__ import annotations

import re

ID = {"id", "key", "uid", "uuid", "index", "idx", "no", "nr", "number", "record_id", "sample_id", "row"}
GROUP = {
    "group", "patient", "patient_id", "subject", "subject_id", "speaker", "speaker_id", "session", "client_id",
    "author", "family", "writer", "user", "user_id", "participant", "participant_id",
}  # fmt: skip
LANG = {"lang", "language", "locale", "lang_code"}
SPLIT = {"split", "set", "subset", "partition", "fold", "usage"}
QUESTION = {"question", "prompt", "instruction", "query", "input", "q", "问题", "提问", "指令", "输入"}
ANSWER = {
    "answer", "output", "response", "completion", "reply", "target_text", "translation",
    "caption", "transcript", "summary", "a", "答案", "回答", "回复", "输出", "译文", "摘要",
}  # fmt: skip
TEXT = QUESTION | {
    "text", "caption", "title", "description", "sentence", "review", "comment", "body", "content", "message", "en", "zh",
    "utterance", "tweet", "sms", "headline", "abstract", "passage", "document", "paragraph", "post", "news", "email",
    "review_text", "text_a", "文本", "内容", "正文", "评论", "评价", "标题", "句子", "描述", "新闻", "留言",
}  # fmt: skip
LABEL = (
    "label", "class", "category", "target", "diagnosis", "outcome", "sentiment", "species", "genre", "emotion",
    "intent", "topic", "result", "y", "标签", "类别", "分类", "情感", "意图", "诊断", "type", "kind", "tag",
)  # fmt: skip
ANSWERS_BELOW = {"label", "labels", "target", "targets", "annotation", "annotations", "标签"}
"""Names of mappings that hold several answers about a row; none of them is given to the model."""
CONTEXT = ("context", "passage", "paragraph", "input", "background", "document", "article", "上下文", "输入")
"""Names of what a question is about, beside it."""
ANSWERS = ("answers", "answer")
"""Names of what holds several right answers, of which the first is written."""
PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("text_a", "text_b"), ("question1", "question2"),
    ("sentence_a", "sentence_b"), ("sentence_1", "sentence_2"), ("text1", "text2"), ("text_1", "text_2"),
    ("question", "sentence"), ("question", "passage"), ("question", "context"),
)  # fmt: skip
"""Names of two texts that are read together."""
SPOKEN = ("transcript", "transcription", "sentence")
"""Names of what is said in a sound."""
LABEL_LISTS = ("labels", "tags", "genres", "categories", "topics", "classes", "label", "标签", "类别")
"""Names of lists of which several classes hold."""
TARGETS = (
    "gold_label", "survived", "churn", "spam", "is_spam", "fraud", "is_fraud", "toxic", "toxicity",
    "hate", "stance", "polarity", "emotions", "severity", "quality", "grade", "rating", "stars",
)  # fmt: skip
"""Other names of what is usually predicted, asked where none of LABEL is there."""
QUANTITIES = (
    "price", "saleprice", "sale_price", "selling_price", "medv", "median_house_value", "salary", "wage", "income",
    "revenue", "sales", "rent", "价格", "房价",
)  # fmt: skip
"""Names of numbers that are usually predicted, where they stand last or nothing else can be asked."""
# a key may be that of a tune, a number a digit, an author who is to be told by the text, a family that of a species
_NO_LABEL = (ID - {"key", "number"}) | (GROUP - {"author", "family"}) | LANG | SPLIT | {
    "speaker_name", "username", "votes", "up_votes", "down_votes", "upvotes", "downvotes", "helpful_votes", "likes",
    "zip", "zipcode", "zip_code", "postcode", "post_code", "postal_code", "postalcode", "plz", "邮编", "year", "年份",
    "url", "uri", "link", "href", "date", "datetime", "timestamp", "created_at", "updated_at",
}  # fmt: skip
TEXTS_BELOW = {"text", "texts", "caption", "captions", "title", "titles", "translation", "translations", "transcripts"}
"""Names of mappings that hold texts, such as one per language."""
LANGUAGE = re.compile(r"[a-z]{2,3}([-_@]\w+)?")


def last_of(column: str) -> str:
    return re.split(r"[.\[\]]+", column.strip().lower())[-1].replace(" ", "_").replace("-", "_")


def parent_of(column: str) -> str:
    """The last part of what a nested column lies in, or "" for one that lies in nothing."""
    above = re.sub(r"\[[^\]]*\]", "", column).rpartition(".")[0]
    return last_of(above) if above else ""


def is_id(column: str) -> bool:
    """Whether a name ends as those of numbers do: `_id`, `userId`, `itemID`."""
    return bool(re.search(r"_id$|[a-z]I[dD]$", column))


def is_no_label(column: str) -> bool:
    """Whether a name says that a column is not what is to be answered: numbers, groups, speakers, votes, places, dates."""
    return last_of(column) in _NO_LABEL or is_id(column) or last_of(column).endswith("_id")


def name_of(column: str) -> str:
    """A task's or field's name after a column: words joined by underscores."""
    return re.sub(r"[^\w]+", "_", column).strip("_").lower() or "value"
