"""Declarations and verdictives by rules: nobody labelled them in the dialogues, and they have forms of their own.

A declaration makes it so by being said (Searle 1976): mostly the first person, the simple present and one of a few
performative verbs (Austin 1962), or a fixed formula ("case dismissed"). A verdictive gives a finding (Austin 1962,
lecture XII). What only reports, asks, wishes or plans is neither. Precision and recall: docs/speech_acts.md.
"""

# ruff: noqa: E501
import re

FIRST = r"\b(?:i|we|as \w+ i)(?:,[^,]{1,40},)?(?: (?:do|now|also|therefore|formally|officially|herewith|am hereby|are hereby))*"
# Verbs that say nothing else in the first person of the present than that it is done.
PERFORMATIVE = (
    "declare|pronounce|resign|appoint|nominate|second the motion|sentence you|sentence the|bequeath|christen|baptize|baptise|"
    "abdicate|renounce|excommunicate|forfeit|dub|proclaim|concede|veto|pardon|inaugurate|acquit|disinherit|ratify|revoke|"
    "annul|rescind|repeal|dissolve|move that we|move to adjourn|call (?:this|the) \\w+ to order|hand over command|"
    "name (?:this|you|him|her|[A-Z]\\w+ as)|knight|ordain|bid \\w|open the floor|make you|hereby"
)
DECLARATIONS = [
    rf"{FIRST} (?:{PERFORMATIVE})\b",
    r"\b(?:is|are|am|be|being|'s|'re) hereby\b",
    r"^hereby\b",
    r"\byou(?:'re| are)(?: now)? (?:fired|hired|promoted|expelled|suspended|disqualified|banned|relieved|dismissed|discharged|under arrest|acquitted)\b",
    r"^(?:effective|as of|from) (?:today|now|immediately|this moment)\b.*\b(?:are|is|becomes?)\b",
    r"^from now on (?:this|you|the) .*\b(?:is|are)\b",
    r"\b(?:meeting|session|hearing|court|class|case|motion|game|trial|engagement|wedding)(?: is| are| stands)?(?: now)? (?:adjourned|dismissed|carried|closed|in session|called off|denied)\b",
    r"\bpolls are (?:now )?(?:closed|open)\b",
    r"\b(?:treaty|law|act|agreement) is now in force\b",
    r"^consider (?:the \w+|it) (?:cancell?ed|closed|done|void|terminated)\b",
    r"^consider yourself (?:hired|fired|promoted|warned|dismissed|invited|suspended|banned|engaged)\b",
    r"^(?:i|we) (?:quit|resign|fold)[.!]*$",
    r"^permission (?:granted|denied)\b",
    r"^with this (?:signature|ring)\b",
]
JUDGES = r"(?:the )?(?:\w+ )?(?:jury|court|tribunal|panel|committee|commission|arbitrator|referee|umpire|judges?|inspectors?|examiners?|auditors?|audit|board|reviewers?|coroner|jurors)"
VERDICTIVES = [
    rf"{FIRST} (?:deem|diagnose|appraise|judged?(?! by)|grade|evaluate|assess|classify|determined?|rule (?:that|in|the|this|it|out|against))\b",
    rf"{FIRST} (?:rate|would rate|'d rate|rank|would rank|'d rank|score) (?:this|the|her|him|it|them|that|your|his|their|\w+ as)\b",
    r"\b(?:i|we)'d (?:rate|rank|give) (?:this|the|it|her|him|your)\b.*",
    rf"{FIRST} (?:find|hold|conclude|estimate|consider|regard|take|interpret|certify) (?:that (?:the|this|your|our|it|he|she|his|her)\b|for the (?:plaintiff|defendant|tenant|claimant)|no (?:merit|fault|evidence)|(?:the|this|your|his|her|their|our)\b.*\b(?:\w+able|\w+ible|\w*valid|void|guilty|liable|justified|credible|genuine|complete|responsible|faithful|to (?:be|have)|as|at|fit)\b)",
    rf"{FIRST} (?:find|found) (?:the (?:defendant|accused)|him|her) (?:not )?(?:guilty|liable|innocent)\b",
    rf"\b{JUDGES} (?:finds?|holds?|rules?|concludes?|decides?|calls? (?:him|her|it)|rates?|recommends?|awards?)\b(?! (?:out|his|her|my|whether|if))",
    r"\b(?:reviewers|inspectors|examiners|judges|arbitrators|auditors|jurors) (?:find|hold|rule|conclude|rate|recommend)\b",
    r"^(?:not )?guilty\b|\bguilty (?:as charged|on all counts)\b",
    r"^objection (?:over-?ruled|sustained)",
    r"\bin (?:my|our)(?: \w+)? (?:judge?ment|assessment|estimation)\b|\bin (?:my|our) (?:expert|professional|considered|medical|legal) opinion\b|\bin the (?:view|opinion|judge?ment) of this\b|\bit is the opinion of this\b",
    r"^(?:my|our|the|overall|final)? ?(?:verdict|score|grade|rating|mark|assessment|finding)s?(?: is| are)?\s*(?:that\b|:|\d)",
    r"\bfinding: ",
    r"\b(?:\w+ )?(?:stars?) (?:out of|,)|^\w+ stars\b",
    r"\b(?:gets|get|deserves|earns) an? [A-F](?:\b|[+-])",
    r"\bgive (?:this|your|the|it)\b.*\b(?:stars?|points?|out of|nine|ten|eight|seven|six|five|four|three|two|one|\d+)\b",
    r"\b(?:put|make|date) (?:the|it|her|him|his|this)\b.* (?:at|to) about\b|\bi (?:put|make) (?:the|it|her|his)\b.*\b(?:odds|\d+|one in|about|fracture)\b",
    r"^(?:strong |clear |weak |borderline )?(?:accept|reject)\.?$|\bis a (?:clear|strong|borderline) (?:accept|reject)\b",
    r"\bappeal (?:is dismissed|fails|is allowed)\b",
    r"\b(?:answer|solution) is (?:correct|wrong|right|incorrect)[:,.]",
    r"\bthat(?:'s| is)? a (?:foul|goal)\b|\bcall that a\b|\bball was (?:in|out)\b",
    r"\bpronounce (?:the patient|him|her) dead\b|\bvalue the \w+ at\b|\breckon the \w+ at\b|\bhold the company responsible\b",
    r"\bon balance\b.*\b(?:better|best|worse)\b",
]
# What reports, asks, wishes or plans: no act of either kind.
OTHERWISE = re.compile(
    r"\?\s*$|\b(?:as soon as|once|before|until|unless|if|when|should) (?:i|we|you|the)\b|^(?:if|when|why|who|how|what|did|does|do|can|could|should|will|would|is|are|please|don't)\b(?! hereby)|"
    r"\b(?:yesterday|tomorrow|last (?:week|month|year|night)|next (?:week|month|year)|in \d{4}|ago|tonight)\b|"
    r"\b(?:i|we) (?:want|hope|wish|might|may|plan|will|would like|used|think|need) (?:to )?|\b(?:he|she|they) (?:says?|said|told)\b|"
    r"\b(?:joked?|the paper says|in the film|in the newspaper)\b|\bevery (?:morning|day|night|week)\b|[\"“]",
    re.IGNORECASE,
)
BOUNDARY = re.compile(r"(?<=[.!?])\s+")
MATCHES = {
    "declaration": re.compile("|".join(f"(?:{rule})" for rule in DECLARATIONS), re.IGNORECASE),
    "verdictive": re.compile("|".join(f"(?:{rule})" for rule in VERDICTIVES), re.IGNORECASE),
}


def ruled(text: str) -> str | None:
    """`declaration` or `verdictive` if a sentence of the text is one, else None."""
    for sentence in BOUNDARY.split(" ".join(text.replace("’", "'").split())):
        if sentence and not OTHERWISE.search(sentence):
            for act, rule in MATCHES.items():
                if rule.search(sentence):
                    return act
    return None
