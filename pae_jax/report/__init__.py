"""`report.html`: the page on one evaluation, its charts and pictures."""
