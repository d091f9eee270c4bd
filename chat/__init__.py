"""What a checkpoint and a data file say of conversations: the tokenizer and its chat format; rows,
in the layouts that are common, as conversations and their text. Token ids are made in data.py."""

from chat.rows import (
    is_text,
    is_training_row,
    prompt_and_answer,
    read_pieces,
    read_rows,
    row_pieces,
    text_field,
)
from chat.template import FORMATS, OWN, Piece
from chat.tokenizer import Tokenizer, load_tokenizer

__all__ = ["FORMATS", "OWN", "Piece", "Tokenizer", "is_text", "is_training_row", "load_tokenizer"]
__all__ += ["prompt_and_answer", "read_pieces", "read_rows", "row_pieces", "text_field"]
