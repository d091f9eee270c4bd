"""Replies of models that reason before they answer."""


def without_reasoning(text: str) -> str:
    """Returns the text behind the last "</think>", or the whole text without one."""
    return text.rpartition("</think>")[2]
