"""Reports: one page per run or comparison of runs, with the same results as Markdown and JSON. Imports no torch.

In reading order:

- ``write.py``: read, render, write.
- ``collect.py``: what a run folder holds at any time; ``lines.py``, ``curves.py``, ``samples.py`` read its large files
  in bounded memory.
- ``content.py``: everything a report shows, as plain values; ``tables.py``, ``charts.py``, ``prompt_charts.py``,
  ``teacher_cards.py``, ``summary.py``, ``examples.py`` arrange results, curves, accuracies, sentences and samples;
  ``figures.py`` writes numbers.
- ``page.py``: the page (``page.html``, ``page.css``, ``page_*.js``); ``markdown.py``; ``terminal.py``.
"""

from megatron_rlpt.reports.terminal import print_evaluation, show_evaluation
from megatron_rlpt.reports.write import JSON_FILE, MARKDOWN_FILE, PAGE_FILE, write_report

__all__ = ["JSON_FILE", "MARKDOWN_FILE", "PAGE_FILE", "print_evaluation", "show_evaluation", "write_report"]
