"""The command line: `app.py` declares commands and options, one module per command does the work.

May import everything of cortexloop that is public. Results go to stdout, progress and problems to stderr.
"""
