"""Parse a judge's reply into a verdict, or into a reason why it has none."""
