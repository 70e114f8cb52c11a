"""The post-trained model in its two roles: judge of candidates and rewriter of suffixes."""
