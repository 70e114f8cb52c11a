"""From text to token ids and back: the policy's tokenizer, and control tokens that a text only spells."""
