"""From a judge's reply to a verdict, or to a reason why there is none."""
