"""Reasoning in a completion: it is not part of the answer."""

OPENED, CLOSED = "<think>", "</think>"  # of DeepSeek-R1 and the models that follow it


def without_reasoning(text: str) -> str:
    """Returns what stands behind the last </think>. A text that begins with <think> and never
    closes it ran out of tokens before its answer, so the answer is empty."""
    _, closed, answer = text.rpartition(CLOSED)
    return "" if not closed and text.lstrip().startswith(OPENED) else answer


def answer_in(example: dict) -> str:
    """Returns the answer in an example's completion. Some prompts open the reasoning, as R1's."""
    opened = OPENED if example["prompt"].rstrip().endswith(OPENED) else ""
    return without_reasoning(opened + example["raw_prediction"])
