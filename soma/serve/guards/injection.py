"""Prompt injection by its wording: texts that give a model orders about its orders.

A score from 0 to 1 out of weighted patterns, joined as independent evidence (noisy or): two weak signs make a strong
one. It reads English, and what stands there; an attack in other words, another language or a picture passes.
The families of attacks are those of Perez and Ribeiro, "Ignore Previous Prompt" (2022), and Greshake et al., "Not what
you've signed up for" (2023).
"""

import re
import unicodedata

ORDERS = r"(?:instructions?|prompts?|orders?|rules?|directions?|guidelines?|commands?|context|training|programming)"
OF_BEFORE = r"(?:previous|prior|above|earlier|preceding|former|original|initial|existing|system|your|all|any|the)"
SIGNS: tuple[tuple[float, str], ...] = (
    # Orders to drop what was ordered.
    (0.9, rf"\b(?:ignore|disregard|forget|override|bypass|skip|drop|discard)\b(?:\W+\w+){{0,3}}?\W+{OF_BEFORE}\b"
          rf"(?:\W+\w+){{0,3}}?\W+{ORDERS}\b"),
    (0.8, r"\b(?:ignore|disregard|forget)\s+(?:everything|all|anything)(?:\s+(?:that\s+)?(?:was\s+|you\s+were\s+|i\s+)?"
          r"(?:said|told|written|above|before))+"),
    (0.8, rf"\b(?:do\s+not|don'?t|stop|no\s+longer|never)\s+"
          rf"(?:follow\w*|obey\w*|adher\w+\s+to|comply\w*\s+with|listen\w*\s+to)"
          rf"(?:\W+\w+){{0,3}}?\W+{ORDERS}\b"),
    (0.6, rf"\b(?:new|updated|real|actual|revised)\s+{ORDERS}\s*(?::|follow|are|from)"),
    # What the model was told is to come out.
    (0.9, rf"\b(?:reveal|show|print|repeat|display|output|leak|tell|give|disclose|recite|share|write\s+out)\b(?:\W+\w+)"
          rf"{{0,4}}?\W+(?:system|hidden|secret|initial|original|internal|confidential)\s+(?:{ORDERS}|message)\b"),
    (0.7, rf"\bwhat\s+(?:is|are|was|were)\s+your\s+(?:(?:system|hidden|secret|initial|original)\s+{ORDERS}"
          r"|exact\s+instructions)\b"),
    (0.6, r"\b(?:repeat|print|output)\s+(?:everything|all|the\s+(?:text|words))(?:\W+\w+){0,3}?\W+(?:above|before)\b"),
    # Another person without the rules.
    (0.7, r"\b(?:you\s+are\s+now|from\s+now\s+on,?\s+you\s+(?:are|will)|act\s+as|pretend\s+(?:to\s+be|you\s+are))\b"
          r"[^.\n]{0,80}\b(?:no\s+(?:rules|restrictions|limits|filters?)|without\s+(?:any\s+)?(?:rules|restrictions"
          r"|limits|filters?|censorship)|unrestricted|unfiltered|uncensored|jailbroken|evil|dan)\b"),
    (0.9, r"\bdo\s+anything\s+now\b|\bjailbreak\s+mode\b|\b(?:developer|debug|god|sudo|admin)\s+mode\s+"
          r"(?:is\s+)?(?:on|enabled|activated)\b"),
    (0.7, r"\b(?:without|ignore|ignoring|bypass\w*|disable|turn\s+off)\s+(?:all\s+|any\s+|your\s+|the\s+)*"
          r"(?:safety|content|ethical|moderation)\s+(?:polic\w+|guidelines|filters?|checks?|restrictions|measures)\b"),
    # Text that plays the frame of a conversation.
    (0.8, r"<\|(?:im_start|im_end|system|endoftext|start_header_id|eot_id)\|>|\[/?INST\]|<</?SYS>>"),
    (0.6, r"(?im)^\W{0,6}(?:system|assistant|developer)\s*(?:message|prompt|note|override)?\s*:\s*\S"),
    (0.5, r"\b(?:end|begin|start)\s+of\s+(?:system\s+)?(?:prompt|instructions|context)\b"),
    # Documents that speak to the model that reads them.
    (0.7, r"\b(?:if\s+you\s+are|attention|note\s+to|dear|hey)\W+(?:an?\s+|the\s+|any\s+|all\s+)?(?:ai|llm"
          r"|language\s+model|chatbot|assistant|ai\s+assistants?|ai\s+model)s?\b[^.\n]{0,60}\b(?:reading|processing|summari[sz]ing|must|"
          r"should|please|you)\b"),
    (0.6, r"\b(?:send|forward|post|upload|exfiltrate|email)\b[^.\n]{0,60}\b(?:conversation|chat\s+history|api\s+keys?|"
          r"passwords?|credentials|user'?s?\s+data|secrets?)\b[^.\n]{0,40}\b(?:to|at)\b[^.\n]{0,20}"
          r"(?:https?://|@|\bme\b)"),
    (0.5, r"\b(?:do\s+not|don'?t|never)\s+(?:tell|inform|mention|reveal|show)\b[^.\n]{0,30}"
          r"\b(?:user|anyone|human)s?\b"),
)  # fmt: skip
PATTERNS = tuple((weight, re.compile(pattern, re.IGNORECASE)) for weight, pattern in SIGNS)
LONGEST = 20_000  # letters that are looked at; of a longer text its beginning and its end
INVISIBLE = re.compile("[\u200b-\u200f\u2060-\u2064\ufeff\u00ad\U000e0000-\U000e007f]")


def injection_score(text: str) -> float:
    """How much a text looks like prompt injection, 0 to 1. "Ignore all previous instructions." has 0.9."""
    if len(text) > LONGEST:
        text = text[: LONGEST // 2] + "\n" + text[-LONGEST // 2 :]
    hidden = len(INVISIBLE.findall(text))
    plain = INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).replace("’", "'")
    innocent = 0.7 if hidden > 10 else 1.0  # many letters that nobody sees are a sign by themselves
    for weight, pattern in PATTERNS:
        if pattern.search(plain):
            innocent *= 1 - weight
    return 1 - innocent
