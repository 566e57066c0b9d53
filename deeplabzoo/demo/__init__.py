"""The web demo: a local server of the standard library (`server`), warm models (`models`), one answer (`answer`), one page."""
