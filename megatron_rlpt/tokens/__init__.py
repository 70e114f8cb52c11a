"""Text to token ids and back: the policy's tokenizer, and control tokens spelled out in texts."""
