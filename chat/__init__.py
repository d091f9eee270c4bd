"""What a checkpoint and a data file say of conversations: the tokenizer and its chat format; rows,
in the layouts that are common, as conversations and their text. Token ids are made in data.py."""

from chat.rows import chat_pieces, is_text, read_pieces, read_rows, text_field
from chat.template import CHAT_FORMATS, OWN, Chat, Piece
from chat.tokenizer import Tokenizer, load_tokenizer

__all__ = ["CHAT_FORMATS", "OWN", "Chat", "Piece", "Tokenizer", "load_tokenizer"]
__all__ += ["chat_pieces", "is_text", "read_pieces", "read_rows", "text_field"]
