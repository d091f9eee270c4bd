"""How a judge's reply is read: which number in it is the judge's own verdict."""

import re

from tasks.reasoning import without_reasoning

UNIT = r"(?:\s?(?:points?|分))?"
NUMBER = rf"[(\[（]?([+-]?\d+(?:\.\d+)?)[)\]）]?{UNIT}"
SCALE = rf"(?:\s?(?:/|out of)\s?(\d+)(?:\.0)?)?{UNIT}[)\]】]?(?:\s?[(（][^()（）\n]*[)）])?"
VALUE = rf"\s?[:：=]?\s?{NUMBER}{SCALE}[.。]?"
NAME = r"[-(\[【]?\s?(?:the |final |my )*(?:total score|总分)[\]】]?"
NAMED_SCALE = r"(?:\s?[(\[（][^()\[\]（）\n]*[)\]）])?"  # "(0-10)"
VERDICT = re.compile(rf"^{NAME}{NAMED_SCALE}(?:\s?(?:is|是|为))?{VALUE}$", re.I | re.M)
BARE_VERDICT = re.compile(rf"\A(?:score)?{VALUE}\Z", re.I)


def read_points(reply: str | None) -> float | None:
    """Returns the points of a reply, divided by 10: the number in its last line that says "total
    score" and nothing else, or the only thing that the reply says. None if there is no number from
    0 to 10. A number inside a sentence may be one that the judge quotes."""
    text = without_reasoning(reply or "")
    lines = (
        " ".join(line.split()) for line in re.sub("[*`#$]", "", text.replace("_", " ")).splitlines()
    )
    text = "\n".join(filter(None, lines))
    for points, scale in VERDICT.findall(text)[-1:] or BARE_VERDICT.findall(text):
        if scale in ("", "10") and 0 <= float(points) <= 10:
            return float(points) / 10
    return None
