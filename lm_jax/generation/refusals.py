"""Whether a model declines instead of answering."""

import re

# Conservative: only how an answer begins, and only with the act refused or the speaker's being a model. An excuse that
# somebody asked for ("I'm sorry, but I'm unable to come into work") is none; nor is "As an AI, I suggest ...".
_APOSTROPHE = "['’]"
_SORRY = (
    rf"(?:(?:i(?:{_APOSTROPHE}m| am) |we(?:{_APOSTROPHE}re| are) )?(?:very |so |really )?sorry"
    r"|i apologi[sz]e|my apologies|unfortunately),?"
)
_MODEL = r"(?:as an?|i am an?|i['’]m an?) (?:ai|artificial intelligence|(?:large )?language model)\b[^.,\n]{0,40},?"
_CANNOT = (
    rf"(?:i|we) (?:cannot|can{_APOSTROPHE}t|can not|won{_APOSTROPHE}t|will not|(?:am|are) (?:not able|unable) to"
    r"|(?:am|are) not (?:comfortable|willing|allowed|permitted)(?: to| with)?|do not feel comfortable)"
    rf"|i{_APOSTROPHE}m (?:not able|unable|not comfortable|not allowed)(?: to| with)?"
)
_ACT = (
    r"(?: directly| ethically| in good conscience)? (?:be able to )?(?:help|assist|comply|fulfil+|provid|creat|generat"
    r"|writ|produc|answer|engag|support|do that|complet|accommodat|participat|discuss|process|respond)"
)
_PATTERNS = (
    rf"(?:{_SORRY}\s*(?:but\s*)?)?(?:{_MODEL}\s*(?:and\s*|so\s*)?)?(?:{_CANNOT}){_ACT}",
    rf"{_SORRY}\s*(?:but\s*)?{_MODEL}",
    r"i must (?:respectfully )?(?:decline|refuse)\b",
    r"(?:非常|很)?(?:抱歉|对不起|不好意思|遗憾)[^。\n]{0,20}(?:无法|不能|不可以|没有办法|拒绝)",
    r"作为(?:一个|一名)?(?:ai|人工智能|语言模型|大语言模型)[^。\n]{0,20}(?:无法|不能|不会)",
    r"我(?:无法|不能)(?:提供|满足|协助|帮助|回答|完成)",
    r"(?:lo siento|lamento|perdón)[^.\n]{0,20}no puedo",
    r"(?:je suis (?:vraiment )?désolée?|désolée?)[^.\n]{0,20}je ne (?:peux|suis)",
    r"(?:es tut mir leid|entschuldigung|leider)[^.\n]{0,20}kann ich[^.\n]{0,40}(?:nicht|kein)",
    r"(?:desculpe|sinto muito|lamento)[^.\n]{0,20}não posso",
    r"mi dispiace[^.\n]{0,20}non posso",
    r"(?:извините|простите|к сожалению)[^.\n]{0,20}не (?:могу|смогу)",
    r"申し訳(?:ありません|ございません)[^。\n]{0,40}(?:できません|できかねます)",
    r"죄송(?:합니다|하지만)[^\n]{0,40}(?:없습니다|어렵습니다)",
)
_REFUSAL = re.compile(r"[\s\"'“*_>#-]*(?:" + "|".join(_PATTERNS) + ")", re.IGNORECASE)


def is_refusal(text: str) -> bool:
    """Whether `text` begins as a refusal does, in eleven languages. Misses refusals rather than flag answers."""
    return bool(_REFUSAL.match(text))
