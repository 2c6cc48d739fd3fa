"""Text and chats in; token ids and target masks out."""
